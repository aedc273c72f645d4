"""Decoding attends by the kernel, with grouped heads and without, and gives what transformers' sdpa gives."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.models import attention
from personafast.ops import _attend


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel."""
    core = pytest.importorskip("personafast._C")
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(core, name)

        def attend(self, *args):
            seen.append(args)
            return core.attend(*args)

    monkeypatch.setitem(_attend._backend._modules, "cpu", Counting())
    return seen


def steps(net, ids, mask, parts):
    """Logits of the prompt and then of `parts` of the rest, with a cache."""
    cache, out, at = None, [], 0
    for length in parts:
        step = net(ids[:, at : at + length], attention_mask=mask[:, : at + length], past_key_values=cache)
        cache, at = step.past_key_values, at + length
        out.append(step.logits)
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_is_what_the_model_computes(key_heads, padded, calls):
    config = tiny.model("llama").config
    config.num_key_value_heads = key_heads
    torch.manual_seed(0)
    net = type(tiny.model("llama"))(config).eval()
    ids = torch.randint(3, tiny.VOCAB, (3, 20))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    parts = [10, 1, 1, 5, 1, 2]
    plain = steps(net, ids, mask, parts)
    assert calls == []
    patch = attention.AttentionPatch(net)
    try:
        found = steps(net, ids, mask, parts)
    finally:
        patch.remove()
    assert len(calls) == tiny.BLOCKS * (len(parts) - 1)
    live = mask.bool()
    torch.testing.assert_close(found[live], plain[live], rtol=1e-4, atol=1e-4)
    assert torch.equal(steps(net, ids, mask, parts), plain) and net.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_the_reference_backend_leaves_it_to_transformers(calls):
    net = tiny.model("llama")
    ids = torch.arange(3, 12)[None]
    plain = steps(net, ids, torch.ones_like(ids), [6, 1, 2])
    attention.AttentionPatch(net)
    with pf.ops.use_backend("reference"):
        assert torch.equal(steps(net, ids, torch.ones_like(ids), [6, 1, 2]), plain)
    assert calls == []


@torch.no_grad()
def test_patches_undo_what_they_did_and_no_more(calls):
    """A draft that is attached elsewhere; and a copy of an attached model, which carries the name already."""
    net = tiny.model("llama")
    ids = torch.arange(3, 12)[None]
    first = attention.AttentionPatch(net)
    second = attention.AttentionPatch(net)
    second.remove()
    steps(net, ids, torch.ones_like(ids), [6, 1])
    assert len(calls) == tiny.BLOCKS and net.config._attn_implementation == attention.NAME
    fresh = tiny.model("llama")
    fresh.config._attn_implementation = attention.NAME
    own = attention.AttentionPatch(fresh)
    steps(fresh, ids, torch.ones_like(ids), [6, 1])
    assert len(calls) == 2 * tiny.BLOCKS
    own.remove()
    first.remove()
    steps(net, ids, torch.ones_like(ids), [6, 1])
    assert len(calls) == 2 * tiny.BLOCKS and net.config._attn_implementation == "sdpa"
