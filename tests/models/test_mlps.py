"""Gated MLPs are found by what they compute, and the kernel computes the same."""

import pytest
import torch
from helpers import tiny
from torch import nn

import personafast as pf
from personafast.models.mlps import find_mlps
from personafast.ops import _silu_mul


@pytest.mark.parametrize(
    ("family", "per_block"), [("llama", 1), ("qwen2", 1), ("qwen3", 1), ("gemma2", 0), ("gpt2", 0), ("gpt_neox", 0)]
)
def test_the_mlps_of_each_family(family, per_block):
    assert len(find_mlps(tiny.model(family))) == per_block * tiny.BLOCKS


class Almost(nn.Module):
    """The gated MLP but for one thing."""

    def __init__(self, thing):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = nn.GELU() if thing == "gelu" else nn.SiLU()
        self.thing = thing

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.thing == "swapped":
            gate, up = up, gate
        y = self.down_proj(self.act_fn(gate) * up)
        return y + x if self.thing == "residual" else y


@pytest.mark.parametrize("thing", ["nothing", "gelu", "swapped", "residual"])
def test_an_mlp_that_computes_something_else_is_left_alone(thing):
    assert bool(find_mlps(nn.Sequential(Almost(thing)))) == (thing == "nothing")


def test_looking_draws_no_random_numbers_and_changes_nothing():
    mlp = Almost("nothing")
    state, parts = torch.get_rng_state(), dict(mlp._modules)
    find_mlps(nn.Sequential(mlp))
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(mlp._modules) == parts and mlp.act_fn.training


@torch.no_grad()
def test_attach_uses_it_and_detach_takes_it_out(net, library, monkeypatch):
    core = pytest.importorskip("personafast._C")
    ids, seen = torch.arange(3, 9)[None], []

    class Counting:
        def __getattr__(self, name):
            return getattr(core, name)

        def silu_mul(self, *args):
            seen.append(1)
            core.silu_mul(*args)

    monkeypatch.setitem(_silu_mul._backend._modules, "cpu", Counting())
    plain = net(ids).logits
    with pf.attach(net, library):
        seen.clear()  # of the trial
        found = net(ids).logits
        assert len(seen) == tiny.BLOCKS
        with pf.ops.use_backend("reference"):
            assert torch.equal(net(ids).logits, plain)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(net(ids).logits, plain) and len(seen) == tiny.BLOCKS
