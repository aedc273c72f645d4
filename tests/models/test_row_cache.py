"""The cache of fixed size: every row at its own length, rolled back by its own count, equal to a fresh forward."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.models import row_attention
from personafast.models.cache import COLUMNS, RowCache
from personafast.models.row_attention import attending, understood

FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "mistral"]


def model(family):
    if family == "mistral":
        import transformers

        torch.manual_seed(0)
        config = tiny.model("llama").config.to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        kept = {name: config[name] for name in (*names, "num_key_value_heads", "head_dim")}
        return transformers.MistralForCausalLM(transformers.MistralConfig(**kept, sliding_window=5)).eval()
    net = tiny.model(family)
    if family == "gemma2":
        for part in net.modules():
            if getattr(part, "sliding_window", None):
                part.sliding_window = 6
        net.config.sliding_window = 6
        # Some versions of transformers let sdpa ignore the soft cap that the configuration asks for.
        net.set_attn_implementation("eager")
    return net


def fresh(net, text):
    return net(torch.tensor([text]), attention_mask=torch.ones(1, len(text)), use_cache=False).logits[0]


def run(net, cache, tokens):
    plan = cache.begin(tokens.shape[1])
    ones = torch.ones_like(tokens)
    with attending(net):
        return net(
            tokens, attention_mask=ones, position_ids=plan.positions, past_key_values=cache, use_cache=True
        ).logits


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rollback_equals_a_fresh_forward_at_every_place(family):
    net = model(family)
    assert understood(net)
    texts = [[5, 6, 7, 8], [9], [10, 11]]
    cache = RowCache(tiny.BLOCKS, 3, 60, torch.device("cpu"))
    tokens = torch.zeros(3, 4, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    logits = run(net, cache, tokens)
    cache.advance(torch.tensor([len(text) for text in texts]))
    generator = torch.Generator().manual_seed(1)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, : len(text)], fresh(net, text), atol=1e-4, rtol=1e-4)
    for step in range(8):
        new = torch.randint(3, tiny.VOCAB, (3, 1 + step % 3), generator=generator)
        logits = run(net, cache, new)
        cache.advance(new.shape[1])
        texts = [text + fed for text, fed in zip(texts, new.tolist(), strict=True)]
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row], fresh(net, text)[-new.shape[1] :], atol=1e-4, rtol=1e-4)
        counts = torch.randint(0, 1 + new.shape[1], (3,), generator=generator)
        cache.rollback(counts)
        texts = [text[: len(text) - count] for text, count in zip(texts, counts.tolist(), strict=True)]
    assert cache.host.tolist() == [len(text) for text in texts]


@torch.no_grad()
def test_without_gaps_it_computes_what_a_dynamic_cache_does_to_the_last_bit():
    from transformers import DynamicCache

    net, twin = model("llama"), model("llama")
    cache, usual = RowCache(tiny.BLOCKS, 2, 40, torch.device("cpu")), DynamicCache()
    with ops.use_backend("reference"):
        for new in (torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11], [12]]), torch.tensor([[13], [14]])):
            expected = twin(new, past_key_values=usual, use_cache=True).logits
            assert torch.equal(run(net, cache, new), expected)
            cache.advance(new.shape[1])


@torch.no_grad()
def test_nothing_moves_while_rows_grow_and_shrink():
    net = model("llama")
    cache = RowCache(tiny.BLOCKS, 2, 40, torch.device("cpu"))
    run(net, cache, torch.tensor([[5, 6], [7, 8]]))
    cache.advance(2)

    def addresses():
        tensors = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
        return [tensor.data_ptr() for tensor in [*tensors, cache.lengths]]

    before = addresses()
    for counts in ([0, 1], [1, 0], [1, 1]):
        run(net, cache, torch.tensor([[5], [6]]))
        cache.advance(1)
        cache.rollback(torch.tensor(counts))
    assert addresses() == before


@torch.no_grad()
def test_rows_that_are_kept_move_to_the_front_of_the_same_buffers():
    net = model("llama")
    cache = RowCache(tiny.BLOCKS, 3, 40, torch.device("cpu"))
    run(net, cache, torch.tensor([[5, 6], [7, 8], [9, 10]]))
    cache.advance(torch.tensor([2, 1, 2]))
    buffer = cache.layers[0].keys.data_ptr()
    cache.keep(torch.tensor([2, 1]))
    logits = run(net, cache, torch.tensor([[11], [12]]))
    torch.testing.assert_close(logits[0, 0], fresh(net, [9, 10, 11])[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, 0], fresh(net, [7, 12])[-1], atol=1e-4, rtol=1e-4)
    assert cache.layers[0].keys.data_ptr() == buffer


def test_a_row_that_is_full_is_refused_before_anything_is_written():
    cache = RowCache(1, 2, 10, torch.device("cpu"))
    assert cache.capacity == COLUMNS
    cache.begin(COLUMNS - 1)
    cache.advance(torch.tensor([COLUMNS - 1, 3]))
    cache.begin(1)
    with pytest.raises(PersonafastError, match=f"RowCache: {COLUMNS - 1} tokens and 2 new ones do not fit into 64"):
        cache.begin(2)
    with pytest.raises(PersonafastError, match="row 1 has 3 tokens, not 4"):
        cache.rollback(torch.tensor([0, 4]))
    assert cache.host.tolist() == [COLUMNS - 1, 3]
    cache.rollback(torch.tensor([2, 0]))
    cache.begin(2)


@torch.no_grad()
def test_a_model_run_without_begin_or_with_attention_of_its_own_is_refused():
    net = model("llama")
    cache = RowCache(tiny.BLOCKS, 1, 40, torch.device("cpu"))
    with pytest.raises(PersonafastError, match="without `begin`"), attending(net):
        net(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    states = torch.zeros(1, 2, 1, 8)
    with pytest.raises(UnsupportedModelError, match="keys of its own"):
        row_attention.attend(net, states, states, states, None)
    plan = cache.begin(1)
    cache.layers[0].update(states, states)
    keys, values = cache.layers[0].update(states, states)
    assert plan.positions.tolist() == [[0]]
    with pytest.raises(UnsupportedModelError, match="attends with s_aux"):
        row_attention.attend(net, states, keys, values, None, s_aux=torch.zeros(2))
    assert net.config._attn_implementation == "sdpa"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    new=st.integers(1, 4),
    window=st.none() | st.integers(1, 9),
)
def test_who_sees_what(lengths, new, window):
    cache = RowCache(1, len(lengths), 30, torch.device("cpu"))
    cache.begin(20)
    cache.advance(torch.tensor(lengths))
    plan = cache.begin(new)
    mask = plan.mask(window)
    seen = torch.ones(len(lengths), 1, new, plan.columns, dtype=torch.bool) if mask is None else mask
    for row, length in enumerate(lengths):
        for place in range(new):
            last = length + place
            first = 0 if window is None else max(0, last - window + 1)
            assert seen[row, 0, place].nonzero().flatten().tolist() == list(range(first, last + 1))


class Flash(ModuleType):
    """What stands in for flash-attn: the parameters of its own `flash_attn_with_kvcache`, by plain attention."""

    def flash_attn_with_kvcache(
        self,
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        block_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        alibi_slopes=None,
        num_splits=0,
        return_softmax_lse=False,
    ):
        assert causal and cache_seqlens.dtype == torch.int32
        rows, new, heads, width = q.shape
        out = torch.empty_like(q)
        groups = heads // k_cache.shape[2]
        for row in range(rows):
            length = int(cache_seqlens[row])
            keys = k_cache[row, :length].repeat_interleave(groups, 1).transpose(0, 1)
            values = v_cache[row, :length].repeat_interleave(groups, 1).transpose(0, 1)
            # Aligned at the lower right corner, as flash-attn has it.
            place = torch.arange(length - new, length)[:, None]
            column = torch.arange(length)
            seen = column <= place
            if window_size[0] >= 0:
                seen &= column >= place - window_size[0]
            scores = q[row].transpose(0, 1) @ keys.transpose(1, 2) * (softmax_scale or width**-0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[row] = (weights @ values).transpose(0, 1)
        return out


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_flash_attention_gets_what_its_signature_asks_for(family, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", Flash("flash_attn"))
    row_attention._flash.cache_clear()
    seen = []

    def through_flash(module, query, key, value, mask, **kwargs):
        plan = key._personafast_plan
        window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
        seen.append((window, kwargs.get("softcap")))
        return row_attention._by_flash(
            row_attention._flash(), query, key, value, plan, kwargs["scaling"], window, kwargs.get("softcap")
        ), None

    monkeypatch.setattr(row_attention, "attend", through_flash)
    try:
        net = model(family)
        cache = RowCache(tiny.BLOCKS, 2, 40, torch.device("cpu"))
        tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 0, 0, 0, 0, 0]])
        run(net, cache, tokens)
        cache.advance(torch.tensor([7, 2]))
        logits = run(net, cache, torch.tensor([[14, 15], [16, 17]]))
        torch.testing.assert_close(logits[0], fresh(net, [*tokens[0].tolist(), 14, 15])[-2:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[1], fresh(net, [12, 13, 16, 17])[-2:], atol=1e-4, rtol=1e-4)
        assert any(window for window, _ in seen) == (family != "llama")
        assert any(cap for _, cap in seen) == (family == "gemma2")
    finally:
        row_attention._flash.cache_clear()


def test_without_flash_attention_torch_attends(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    row_attention._flash.cache_clear()
    assert row_attention._flash() is None
    row_attention._flash.cache_clear()
    assert F.scaled_dot_product_attention is not None
