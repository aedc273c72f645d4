"""Training through steering: every operation has a gradient, which finite differences confirm."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.ops import SteerMode, inject_, steer_, use_backend
from personafast.ops._inject import injected
from personafast.ops._steer import steered

MODES = [None, *SteerMode]
SLOTS = torch.tensor([0, 1, -1, 2, 0, 1], dtype=torch.int32)


def forms(mode):
    """(out of place, in place) with every input but the hidden states bound."""
    generator = torch.Generator().manual_seed(2)
    bank = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    bank[2] = 0
    scale = torch.tensor([1.0, 0.3, 1.0, 0.7, 0.0, 2.0])
    if mode is None:
        return (
            lambda h: injected(h, bank, SLOTS, scale),
            lambda h: inject_(h, bank, SLOTS, scale),
        )
    codes = torch.full((3,), int(mode), dtype=torch.int8)
    params = torch.tensor([[0.1, 0.9], [0.2, 0.2], [1.0, 1.0]])
    return (
        lambda h: steered(h, bank, SLOTS, codes, params, scale),
        lambda h: steer_(h, bank, SLOTS, codes, params, scale),
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_differentiable_form_is_the_operator(mode):
    functional, in_place = forms(mode)
    hidden = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden[3] = 0  # and its slot has no direction: a root of 0 on every way
    with use_backend("reference"):
        expected = in_place(hidden.clone())
    assert torch.equal(functional(hidden), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_finite_differences(mode):
    hidden = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(forms(mode)[0], hidden)
    still = torch.zeros(6, 5, dtype=torch.float64, requires_grad=True)
    forms(mode)[0](still).sum().backward()
    assert still.grad.isfinite().all()


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("operation", ["add", "ablate", "clamp", "norm_preserving", "replace"])
def test_a_loss_reaches_what_lies_before_the_steered_block(net, library, operation):
    """Forward passes with and without gradients agree, and a step downhill lowers the loss."""
    ids = torch.randint(3, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    more = {"low": 0.5, "high": 1.0} if operation == "clamp" else {"strength": 0.7}
    step = pf.Steering({"creative": 1.0}, operation, positions="response", blocks=(1, 2), **more)
    with pf.attach(net, library) as handle, handle.using([pf.Persona(steering=[step]), None], [3, 6]):
        with torch.no_grad():
            quiet = net(ids).logits
        out = net(ids, labels=ids)
        torch.testing.assert_close(out.logits, quiet, atol=1e-5, rtol=1e-5)
        out.loss.backward()
        weight = net.model.layers[0].mlp.up_proj.weight
        assert weight.grad.isfinite().all() and weight.grad.norm() > 0
        with torch.no_grad():
            weight -= 1e-3 * weight.grad / weight.grad.norm()
            assert net(ids, labels=ids).loss < out.loss
