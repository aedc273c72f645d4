import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _token_logprobs


def make(rows, width, vocabulary, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    lm_head = (torch.randn(vocabulary, width, generator=g) / 4).to(dtype)
    tokens = torch.randint(0, vocabulary, (rows,), generator=g)
    temperature = 0.5 + torch.rand(rows, generator=g)
    bias = torch.randn(vocabulary, generator=g).to(dtype)
    return hidden, lm_head, tokens, temperature, bias


def by_hand(hidden, lm_head, tokens, temperature, bias, logit_scale, softcap, dtype=torch.float64):
    logits = hidden.to(dtype) @ lm_head.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits.to(torch.float64 if dtype == torch.float64 else torch.float32) * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature is not None:
        logits = logits / temperature[:, None]
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens.long()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [(False, False, 1.0, 0.0), (True, True, 0.25, 0.0), (True, False, 2.0, 5.0)])
def test_error_rule(backend, dtype, options, within_twice):
    heated, biased, logit_scale, softcap = options
    hidden, lm_head, tokens, temperature, bias = make(23, 33, 101, dtype, 0)
    args = (hidden, lm_head, tokens, temperature if heated else None, bias if biased else None, logit_scale, softcap)
    with ops.use_backend(backend):
        out = ops.token_logprobs(*args)
    assert out.dtype == torch.float32
    within_twice(out, by_hand(*args, dtype=dtype), by_hand(*args), small=1e-5)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 7, 13]),
    width=st.sampled_from([1, 31, 32, 33, 100, 1030]),
    vocabulary=st.sampled_from([1, 3, 4, 63, 64, 65, 129, 300, 4200]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    options=st.tuples(st.booleans(), st.booleans(), st.sampled_from([1.0, 0.25]), st.sampled_from([0.0, 5.0, 30.0])),
    seed=st.integers(0, 1000),
)
def test_kernel_obeys_the_error_rule(rows, width, vocabulary, dtype, options, seed):
    pytest.importorskip("personafast._C")
    heated, biased, logit_scale, softcap = options
    hidden, lm_head, tokens, temperature, bias = make(rows, width + 3, vocabulary, dtype, seed)
    hidden, lm_head = hidden[:, :width], lm_head[:, :width]
    args = (hidden, lm_head, tokens, temperature if heated else None, bias if biased else None, logit_scale, softcap)
    with ops.use_backend("cpu"):
        out = ops.token_logprobs(*args)
    assert out.dtype == torch.float32 and out.shape == (rows,) and not out.isnan().any()
    if rows:
        exact = by_hand(*args)
        allowed = (by_hand(*args, dtype=torch.float32).double() - exact).abs().max().item()
        # Against plain torch in fp32, though the inputs may be 16 bit: the logits are not rounded to the inputs' dtype.
        error = (out.double() - exact).abs().max().item()
        terms = (hidden.double().abs() @ lm_head.double().abs().T).max().item()
        assert error <= 2 * allowed + 2e-6 + 2.0**-23 * terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_depends_neither_on_the_batch_nor_on_threads(dtype):
    pytest.importorskip("personafast._C")
    hidden, lm_head, tokens, temperature, bias = make(11, 200, 5003, dtype, 4)
    threads = torch.get_num_threads()
    with ops.use_backend("cpu"):
        together = ops.token_logprobs(hidden, lm_head, tokens, temperature, bias)
        for t in range(11):
            row = slice(t, t + 1)
            assert torch.equal(
                ops.token_logprobs(hidden[row], lm_head, tokens[row], temperature[row], bias), together[row]
            )
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(ops.token_logprobs(hidden, lm_head, tokens, temperature, bias), together)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_barred_words_large_logits_and_nan(backend):
    hidden, lm_head, tokens, _, bias = make(4, 16, 200, torch.float32, 5)
    bias[:150] = -torch.inf
    tokens[:] = torch.tensor([10, 160, 199, 150])
    with ops.use_backend(backend):
        out = ops.token_logprobs(hidden, lm_head, tokens, None, bias)
        assert out[0] == -torch.inf
        torch.testing.assert_close(out, by_hand(hidden, lm_head, tokens, None, bias, 1.0, 0.0).float())
        steep = ops.token_logprobs(1000 * hidden, lm_head, tokens)
        torch.testing.assert_close(
            steep, by_hand(1000 * hidden, lm_head, tokens, None, None, 1.0, 0.0).float(), rtol=1e-5, atol=1e-2
        )
        hidden[2, 3] = torch.nan
        out = ops.token_logprobs(hidden, lm_head, tokens)
        assert out.isnan().tolist() == [False, False, True, False]


def test_a_backend_asked_for_by_name_does_not_fall_back():
    pytest.importorskip("personafast._C")
    hidden, lm_head, tokens, _, _ = make(3, 8, 11, torch.float64, 6)
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        ops.token_logprobs(hidden, lm_head, tokens)


def test_blocks_of_rows_give_the_same(monkeypatch):
    hidden, lm_head, tokens, temperature, bias = make(_token_logprobs.KERNEL_ROWS + 9, 33, 101, torch.float32, 1)
    with ops.use_backend("reference"):
        whole = ops.token_logprobs(hidden, lm_head, tokens, temperature, bias)
    for rows in (1, 4, 22, 73):
        monkeypatch.setattr(_token_logprobs, "BLOCK_LOGITS", rows * 101)
        torch.testing.assert_close(ops.token_logprobs(hidden, lm_head, tokens, temperature, bias), whole)


def test_int32_tokens_and_no_rows():
    hidden, lm_head, tokens, _, _ = make(4, 8, 11, torch.float32, 2)
    assert torch.equal(ops.token_logprobs(hidden, lm_head, tokens.int()), ops.token_logprobs(hidden, lm_head, tokens))
    assert ops.token_logprobs(hidden[:0], lm_head, tokens[:0]).shape == (0,)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_values_are_named(backend):
    hidden, lm_head, tokens, temperature, _ = make(4, 8, 11, torch.float32, 3)
    with ops.use_backend(backend):
        for wrong in (-1, 11):
            tokens[2] = wrong
            with pytest.raises(PersonafastError, match=f"`tokens` holds {wrong}, but `lm_head` has 11 tokens"):
                ops.token_logprobs(hidden, lm_head, tokens)
        tokens[2] = temperature[1] = 0
        with pytest.raises(PersonafastError, match="`temperature` holds 0, expected more than 0"):
            ops.token_logprobs(hidden, lm_head, tokens, temperature)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"`hidden` has shape \[3\]"),
        ({"lm_head": torch.zeros(5, 7)}, r"`lm_head` has shape \[5, 7\]"),
        ({"lm_head": torch.zeros(5, 8, dtype=torch.float16)}, "`lm_head` has dtype float16"),
        ({"tokens": torch.zeros(3)}, "`tokens` has dtype float32"),
        ({"temperature": torch.ones(2)}, r"`temperature` has shape \[2\]"),
        ({"bias": torch.zeros(4)}, r"`bias` has shape \[4\]"),
        ({"softcap": -1.0}, "`softcap` is -1"),
        ({"lm_head": torch.zeros(5, 8, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"hidden": torch.zeros(3, 8), "lm_head": torch.zeros(5, 8), "tokens": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(PersonafastError, match=message):
        ops.token_logprobs(**{**good, **change})
