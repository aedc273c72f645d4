import pytest
import torch

from personafast import ops
from personafast.errors import PersonafastError
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


def test_blocks_of_rows_give_the_same(monkeypatch):
    hidden, lm_head, tokens, temperature, bias = make(23, 33, 101, torch.float32, 1)
    whole = ops.token_logprobs(hidden, lm_head, tokens, temperature, bias)
    for rows in (1, 4, 22, 23):
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
