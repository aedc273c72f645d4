import pytest
import torch
from helpers.backends import BACKENDS, on

from personafast import ops
from personafast.errors import PersonafastError


def make(B=12, N=3, k=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    ref, policy = -3 * torch.rand(B, k, generator=g), -3 * torch.rand(N, B, k, generator=g)
    rules, p = torch.arange(B, dtype=torch.int32) % 6, 1 + torch.rand(B, generator=g)
    weights, carried = torch.rand(B, N, generator=g), torch.randn(B, N, generator=g)
    bound, log_u = 2 * torch.rand(B, k, generator=g), torch.rand(B, k, generator=g).log()
    lengths = torch.randint(0, k + 1, (B,), generator=g, dtype=torch.int32)
    return [ref.to(dtype), policy.to(dtype), weights, carried, rules, p], [bound.to(dtype), log_u, lengths]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_one_after_the_other(backend, dtype):
    of_scores, of_accept = make(dtype=dtype)
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("chunk_accept has no C++ kernel for float64")
    with on(backend):
        scores, accepted = ops.chunk_scores_accept(*of_scores, *of_accept)
        assert torch.equal(scores, ops.chunk_scores(*of_scores))
        assert torch.equal(accepted, ops.chunk_accept(scores, *of_accept))
    assert scores.dtype == torch.float32 and accepted.dtype == torch.int32 and 0 < int(accepted.sum())


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, torch.zeros(3, 12, 5), r"`policy_logp` has shape \[3, 12, 5\], expected \[N, B, k\] = \[3, 12, 4\]"),
        (4, torch.full((12,), 9, dtype=torch.int32), "`aggregator` holds the unknown code 9"),
        (6, torch.zeros(12, 5), r"`log_bound` has shape \[12, 5\], expected \[B, k\] = \[12, 4\]"),
        (8, torch.zeros(12), "`lengths` has dtype float32, expected int32"),
        (7, torch.zeros(12, 4, requires_grad=True), "has no gradient"),
    ],
)
def test_bad_input_is_named(index, value, message):
    of_scores, of_accept = make()
    args = [*of_scores, *of_accept]
    args[index] = value
    with pytest.raises(PersonafastError, match=f"{message}"):
        ops.chunk_scores_accept(*args)
