import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError


@settings(deadline=None, max_examples=80)
@given(
    B=st.integers(0, 5),
    k=st.integers(0, 6),
    holes=st.booleans(),
    backend=st.sampled_from(["auto", "reference"]),
    seed=st.integers(0, 1000),
)
def test_longest_prefix_that_stands(B, k, holes, backend, seed):
    g = torch.Generator().manual_seed(seed)
    scores, bound = torch.randn(B, k, generator=g), torch.randn(B, k, generator=g)
    log_u = torch.rand(B, k, generator=g).log()
    if holes:
        scores[torch.rand(B, k, generator=g) < 0.3] = -math.inf
        bound[torch.rand(B, k, generator=g) < 0.3] = -math.inf
    lengths = torch.randint(0, k + 1, (B,), generator=g, dtype=torch.int32)
    with ops.use_backend(backend):
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


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_longer_prefix_wins_over_a_shorter_one_and_nan_rejects(backend):
    zeros = torch.zeros(3, 3)
    log_u = torch.tensor([[-1.0, 1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, float("nan"), float("nan")]])
    with ops.use_backend(backend):
        accepted = ops.chunk_accept(zeros, zeros, log_u, torch.tensor([3, 2, 3], dtype=torch.int32))
    assert accepted.tolist() == [3, 1, 1]


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
