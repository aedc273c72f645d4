import pytest
import torch

from personafast import ops


@pytest.fixture(autouse=True)
def _automatic_backend():
    with ops.use_backend("auto"):
        yield


@pytest.fixture
def within_twice():
    """The error rule: against float64, at most twice what plain torch errs in the same precision, plus a little."""

    def check(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, small: float = 1e-6) -> None:
        assert actual.shape == exact.shape
        assert not actual.isnan().any()
        error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
        allowed = (plain.double() - exact).abs().max().item() if exact.numel() else 0.0
        assert error <= 2 * allowed + small, f"error {error:.3g}, plain torch {allowed:.3g}"

    return check
