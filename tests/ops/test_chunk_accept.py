import math

import pytest
import torch
from helpers.backends import BACKENDS, on
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=80)
@given(
    B=st.integers(0, 5),
    k=st.integers(0, 6),
    holes=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_longest_prefix_that_stands(backend, B, k, holes, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    scores, bound = torch.randn(B, k, generator=g), torch.randn(B, k, generator=g)
    log_u = torch.rand(B, k, generator=g).log()
    if holes:
        scores[torch.rand(B, k, generator=g) < 0.3] = -math.inf
        bound[torch.rand(B, k, generator=g) < 0.3] = -math.inf
    lengths = torch.randint(0, k + 1, (B,), generator=g, dtype=torch.int32)
    scores, bound, log_u = scores.to(dtype), bound.to(dtype), log_u.to(dtype)
    with on(backend):
        accepted = ops.chunk_accept(scores, bound, log_u, lengths)
    assert accepted.dtype == torch.int32
    for b in range(B):
        stands = [
            j
            for j in range(1, int(lengths[b]) + 1)
            if float(scores[b, j - 1]) > -math.inf
            and float(log_u[b, j - 1]) < float(scores[b, j - 1] - bound[b, j - 1])
        ]
        assert int(accepted[b]) == max(stands, default=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longer_prefix_wins_over_a_shorter_one_and_nan_rejects(backend):
    zeros = torch.zeros(3, 3)
    log_u = torch.tensor([[-1.0, 1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, float("nan"), float("nan")]])
    with on(backend):
        accepted = ops.chunk_accept(zeros, zeros, log_u, torch.tensor([3, 2, 3], dtype=torch.int32))
    assert accepted.tolist() == [3, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_compared_in_fp32(backend):
    scores, bound = torch.tensor([[8.0]], dtype=torch.bfloat16), torch.tensor([[0.0625]], dtype=torch.bfloat16)
    log_u = torch.tensor([[7.96875]], dtype=torch.bfloat16)  # 8 - 1/16 in bf16 is 7.9375 rounded to 7.9375: below
    one = torch.ones(1, dtype=torch.int32)
    with on(backend):
        assert ops.chunk_accept(scores, bound, log_u, one).tolist() == [0]
        assert ops.chunk_accept(scores, bound / 64, log_u, one).tolist() == [1]
        # 512 - 1 is 512 in bf16, and 511 here.
        assert ops.chunk_accept(scores * 64, bound * 16, log_u * 0 + 511, one).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_beyond_the_chunk_are_the_chunk_and_negative_ones_are_none(backend):
    zeros, lengths = torch.zeros(3, 2), torch.tensor([9, -1, 1], dtype=torch.int32)
    with on(backend):
        assert ops.chunk_accept(zeros, zeros, zeros - 1, lengths).tolist() == [2, 0, 1]


def test_float64_decides_in_float64_and_not_in_the_kernel():
    scores, one = torch.tensor([[1e-12]], dtype=torch.float64), torch.ones(1, dtype=torch.int32)
    zeros = torch.zeros(1, 1)
    big = torch.full((1, 1), 1.0)
    assert ops.chunk_accept(scores + 1, big, zeros, one).tolist() == [1]
    assert ops.chunk_accept((scores + 1).float(), big, zeros, one).tolist() == [0]
    pytest.importorskip("personafast._C")
    with on("cpu"), pytest.raises(BackendError, match="chunk_accept: backend 'cpu' cannot take dtype"):
        ops.chunk_accept(scores, big, zeros, one)


def test_kernel_serves_every_layout_and_writes_every_output():
    core = pytest.importorskip("personafast._C")
    g = torch.Generator().manual_seed(0)
    scores, bound, log_u = torch.randn(3, 6, 4, generator=g)
    lengths = torch.tensor([4, 3, 0, 4, 2, 1], dtype=torch.int32)
    with on("cpu"):
        expected = ops.chunk_accept(scores, bound, log_u, lengths)
        turned = (x.T.contiguous().T for x in (scores, bound, log_u))
        assert torch.equal(ops.chunk_accept(*turned, lengths.repeat(2, 1).T[:, 1]), expected)
    out = torch.full((8,), -9, dtype=torch.int32)
    core.chunk_accept(out[1:].data_ptr(), *(x.data_ptr() for x in (scores, bound, log_u, lengths)), 6, 4)
    assert torch.equal(out[1:7], expected) and (out[[0, 7]] == -9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2)}, r"`scores` has shape \[2\]"),
        ({"log_bound": torch.zeros(2, 4)}, r"`log_bound` has shape \[2, 4\]"),
        ({"log_u": torch.zeros(2, 3, dtype=torch.int64)}, "`log_u` has dtype int64"),
        ({"lengths": torch.zeros(2)}, "`lengths` has dtype float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"`lengths` has shape \[3\]"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "scores": torch.zeros(2, 3),
        "log_bound": torch.zeros(2, 3),
        "log_u": torch.zeros(2, 3),
        "lengths": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(PersonafastError, match=message):
        ops.chunk_accept(**{**good, **change})
