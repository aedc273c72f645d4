"""Training-free persona masks from activation statistics (arXiv 2602.07164, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from personafast import ops
from personafast.errors import PersonafastError
from personafast.masks.mask import PersonaMask
from personafast.models.anatomy import anatomy, is_conv1d
from personafast.models.reading import Reader, TokenizedText, batches


@torch.no_grad()
def calibrate(model: nn.Module, texts: Sequence[TokenizedText], *, batch_size: int = 32) -> dict[str, torch.Tensor]:
    """A[j] = mean over response tokens of |x_j|, x the input of each linear of the blocks.

    Returns:
        module path -> float64 [in].

    Raises:
        PersonafastError: no texts.
    """
    if not texts:
        raise PersonafastError("texts: empty; give at least one calibration text")
    parts = anatomy(model)
    sums: dict[str, torch.Tensor] = {}
    chosen: torch.Tensor | None = None

    def accumulate(path: str) -> Callable[[torch.Tensor], None]:
        def see(x: torch.Tensor) -> None:
            # x: [B, L, I]; chosen: [B, L]
            assert chosen is not None
            total = x.reshape(*chosen.shape, -1)[chosen.to(x.device)].abs().double().sum(dim=0).cpu()
            sums[path] = sums[path] + total if path in sums else total

        return see

    tokens = 0
    device = next(model.parameters()).device
    with Reader() as reader:
        for path, linear in parts.linears.items():
            reader.on_input(linear, accumulate(path))
        for ids, live, response in batches(texts, batch_size, device):
            chosen = response
            tokens += int(response.sum())
            model(input_ids=ids, attention_mask=live, use_cache=False)
    return {path: total / tokens for path, total in sums.items()}


@torch.no_grad()
def build_mask(model: nn.Module, statistics: Mapping[str, torch.Tensor], *, sparsity: float = 0.5) -> PersonaMask:
    """Keep the top (1 - sparsity) of S_ij = |W_ij| A[j] within each output row; ties go to the smaller index.

    Args:
        model: the model the statistics were gathered from.
        statistics: module path -> A [in], from `calibrate`.
        sparsity: share of weights dropped in every row, 0 <= sparsity < 1.

    Raises:
        PersonafastError: a sparsity out of range, a path the model lacks, statistics of another width.
    """
    if not 0 <= sparsity < 1:
        raise PersonafastError(f"sparsity: {sparsity} is not in [0, 1)")
    linears = anatomy(model).linears
    words, widths = {}, {}
    for path, mean in statistics.items():
        if path not in linears:
            raise PersonafastError(f"statistics[{path!r}]: the model has no such linear; calibrate on this model")
        linear = linears[path]
        weight = linear.weight.t() if is_conv1d(linear) else linear.weight  # type: ignore[operator]
        assert isinstance(weight, torch.Tensor)
        if mean.shape != weight.shape[1:]:
            raise PersonafastError(
                f"statistics[{path!r}]: {mean.numel()} channels for a linear of {weight.shape[1]} inputs"
            )
        score = weight.abs().double().cpu() * mean
        keep = round((1 - sparsity) * weight.shape[1])
        order = score.argsort(dim=1, descending=True, stable=True)[:, :keep]
        mask = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, order, True)
        words[path], widths[path] = ops.pack_mask(mask), weight.shape[1]
    return PersonaMask(words, widths, {"method": "wanda", "statistic": "mean_abs", "sparsity": sparsity})
