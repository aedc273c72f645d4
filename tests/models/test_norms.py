"""RMSNorms are found by what they compute, and the kernel computes the same."""

import pytest
import torch
from helpers import tiny
from torch import nn

import personafast as pf
from personafast.models import patch
from personafast.models.norms import find_norms


@pytest.mark.parametrize(
    ("family", "per_block", "more"),
    [("llama", 2, 1), ("qwen2", 2, 1), ("qwen3", 4, 1), ("gemma2", 0, 0), ("gpt2", 0, 0), ("gpt_neox", 0, 0)],
)
def test_the_norms_of_each_family(family, per_block, more):
    found = find_norms(tiny.model(family))
    assert len(found) == per_block * tiny.BLOCKS + more
    assert all(isinstance(getattr(norm, eps), float) for norm, eps in found)


class Almost(nn.Module):
    """RMSNorm but for one thing."""

    def __init__(self, thing):
        super().__init__()
        self.weight, self.eps, self.thing = nn.Parameter(torch.ones(16)), 1e-6, thing

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.thing == "centred" else x
        eps = 1e-5 if self.thing == "another eps" else self.eps
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return y * (1 + self.weight if self.thing == "one added" else self.weight)


class AlmostNorm(Almost):
    pass


@pytest.mark.parametrize("thing", ["nothing", "centred", "another eps", "one added"])
def test_a_norm_that_computes_something_else_is_left_alone(thing):
    assert bool(find_norms(nn.Sequential(AlmostNorm(thing)))) == (thing == "nothing")


@torch.no_grad()
def test_attach_uses_it_and_detach_takes_it_out(net, library, monkeypatch):
    pytest.importorskip("personafast._C")
    ids, seen = torch.arange(3, 9)[None], []
    run_kernel = patch.run_kernel
    monkeypatch.setattr(patch, "run_kernel", lambda *a: (seen.append(1), run_kernel(*a))[1])
    plain = net(ids).logits
    with pf.attach(net, library):
        found = net(ids).logits
    assert len(seen) == 2 * tiny.BLOCKS + 1
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(net(ids).logits, plain) and len(seen) == 2 * tiny.BLOCKS + 1


@torch.no_grad()
def test_under_the_reference_backend_a_norm_runs_its_own_forward(net, library, monkeypatch):
    calls = []
    kind = type(net.model.norm)
    forward = kind.forward
    with pf.attach(net, library):
        monkeypatch.setattr(kind, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
        with pf.ops.use_backend("reference"):
            net(torch.arange(3, 9)[None])
    assert len(calls) == 2 * tiny.BLOCKS + 1
