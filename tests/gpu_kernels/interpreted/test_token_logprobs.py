import itertools
import math
from unittest import mock

import pytest
import torch
from personafast._triton import token_logprobs as launcher
from personafast._triton.token_logprobs import token_logprobs_config

from personafast import ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _token_logprobs

OPTIONS = [(False, False, 1.0, 0.0), (True, True, 0.25, 0.0), (True, False, 2.0, 5.0), (False, True, 1.0, 30.0)]


def make(rows, width, vocabulary, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    lm_head = (torch.randn(vocabulary, width, generator=g) / 4).to(dtype)
    tokens = torch.randint(0, vocabulary, (rows,), generator=g)
    temperature = 0.5 + torch.rand(rows, generator=g)
    bias = torch.randn(vocabulary, generator=g).to(dtype)
    return hidden, lm_head, tokens, temperature, bias


def plain(hidden, lm_head, tokens, temperature, bias, logit_scale, softcap, dtype):
    wide = [None if x is None else x.to(dtype) for x in (hidden, lm_head, temperature, bias)]
    logits = torch.nn.functional.linear(wide[0], wide[1], wide[3]) * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature is not None:
        logits = logits / wide[2][:, None]
    return logits.log_softmax(-1).gather(1, tokens.long()[:, None])[:, 0]


def obeys_the_error_rule(args):
    exact = plain(*args, dtype=torch.float64)
    allowed = (plain(*args, dtype=torch.float32) - exact).abs().max()
    out = ops.token_logprobs(*args)
    assert out.dtype == torch.float32 and out.shape == exact.shape
    assert (out - exact).abs().max() <= 2 * allowed + 2e-6


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 64, 1), (3, 33, 130), (17, 130, 257), (33, 1, 300), (70, 128, 700)]
)
def test_error_rule(dtype, rows, width, vocabulary, options):
    heated, biased, logit_scale, softcap = options
    hidden, lm_head, tokens, temperature, bias = make(rows, width, vocabulary, dtype)
    tokens[0] = vocabulary - 1
    obeys_the_error_rule((hidden, lm_head, tokens, temperature if heated else None, bias if biased else None,
                          logit_scale, softcap))  # fmt: skip


@pytest.mark.parametrize("rows", [9, 140])
def test_strides_int32_tokens_and_several_tiles_of_rows(rows):
    hidden, lm_head, tokens, temperature, bias = make(rows, 71, 260, torch.float16, 1)
    heat = torch.stack([temperature, temperature], 1)[:, 0]
    args = (tokens.int(), heat, bias.repeat_interleave(2)[::2], 1.0, 0.0)
    obeys_the_error_rule((hidden[:, :67], lm_head[:, :67], *args))
    obeys_the_error_rule((hidden[:, :67].T.contiguous().T, lm_head[:, 3:70], *args))


def test_tiles_for_gpus_of_little_shared_memory():
    large, small = 227 << 10, 99 << 10
    for rows, shared in itertools.product((16, 32, 64, 128), (large, 163 << 10, small)):
        tile = token_logprobs_config(rows, 4096, 2, False, shared)
        held = (tile.constants["BLOCK_V"] + rows) * 64 * 2 * tile.options["num_stages"]
        assert held <= shared and tile.options["num_stages"] >= 3
        assert tile.constants["BLOCK_V"] % tile.constants["PART"] == 0


def test_a_row_does_not_depend_on_the_others():
    hidden, lm_head, tokens, temperature, bias = make(70, 64, 300, torch.float32, 2)
    together = ops.token_logprobs(hidden, lm_head, tokens, temperature, bias)
    for rows in (slice(0, 1), slice(9, 30)):
        alone = ops.token_logprobs(hidden[rows], lm_head, tokens[rows], temperature[rows], bias)
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=2e-6)


def test_barred_words_large_logits_and_nan():
    hidden, lm_head, tokens, _, bias = make(4, 16, 400, torch.float32, 3)
    bias[:300] = -math.inf
    tokens[:] = torch.tensor([10, 310, 399, 300])
    out = ops.token_logprobs(hidden, lm_head, tokens, None, bias)
    assert out[0] == -math.inf
    expected = plain(hidden, lm_head, tokens, None, bias, 1.0, 0.0, torch.float64).float()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    bias[:] = -math.inf
    assert ops.token_logprobs(hidden, lm_head, tokens, None, bias).isnan().all()
    steep = ops.token_logprobs(1000 * hidden, lm_head, tokens)
    expected = plain(1000 * hidden, lm_head, tokens, None, None, 1.0, 0.0, torch.float64).float()
    torch.testing.assert_close(steep, expected, rtol=1e-5, atol=1e-2)
    hidden[2, 3] = math.nan
    lm_head[7, 2] = math.inf
    out = ops.token_logprobs(hidden[1:], lm_head, tokens[1:])
    assert out[1].isnan()
    assert out.isnan().tolist() == _token_logprobs.reference(hidden[1:], lm_head, tokens[1:]).isnan().tolist()


def test_a_token_that_is_none_is_nan_and_nothing_is_read_for_it():
    hidden, lm_head, tokens, _, _ = make(5, 16, 130, torch.float32, 4)
    good = ops.token_logprobs(hidden, lm_head, tokens)
    tokens[0], tokens[2], tokens[3] = 130, -1, 1 << 40
    # Memory that is NaN would hide that nobody wrote the logit of such a token.
    with mock.patch.object(torch, "empty", torch.zeros):
        out = launcher(hidden, lm_head, tokens, None, None, 1.0, 0.0)
    assert out.isnan().tolist() == [True, False, True, True, False] and out[4] == good[4]
    with pytest.raises(PersonafastError, match="`tokens` holds -1"):
        ops.token_logprobs(hidden, lm_head, tokens)


def test_no_rows():
    hidden, lm_head, tokens, _, _ = make(2, 8, 11, torch.float32, 5)
    assert ops.token_logprobs(hidden[:0], lm_head, tokens[:0]).shape == (0,)


def test_what_the_kernel_does_not_take():
    hidden, lm_head, tokens, _, _ = make(2, 8, 11, torch.float64, 6)
    with pytest.raises(BackendError, match="float64"):
        ops.token_logprobs(hidden, lm_head, tokens)
    with pytest.raises(BackendError, match="adjacent"):
        ops.token_logprobs(hidden.float(), lm_head.float().T.contiguous().T, tokens)
