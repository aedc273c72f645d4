"""Per-text mean activations of one side of a contrast: streamed, summed, and kept on disk where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from personafast._io import read_safetensors, write_safetensors
from personafast.errors import PersonafastError
from personafast.models.anatomy import anatomy
from personafast.models.reading import Reader, TokenizedText, evaluating, forward, input_device, longest_first, padded


class TextMeans:
    """What is kept of n texts: the float64 sum of their mean activations, and each text's mean in float32 if asked.

    A text's mean activation is [num_blocks, hidden]: over the tokens chosen by `positions`, nothing a token survives.
    The sum makes `mean_diff` exact whatever n; the means are the sufficient statistics of every other method and of the
    reliability figures. They take n * num_blocks * hidden * 4 bytes (100 texts of a 32 x 4096 model: 52 MB): in memory
    without a folder, on disk with one, one file a batch, from which a block is read at a time.

    Args:
        count: n.
        keep: whether to keep each text's mean.
        folder: where the files lie; texts that are in there already are not read again.
    """

    def __init__(self, count: int, *, keep: bool = True, folder: Path | None = None) -> None:
        self.count = count
        self.keep = keep
        self._folder = folder
        self._sum: torch.Tensor | None = None
        self._rows: list[list[int]] = []
        self._means: list[torch.Tensor] = []
        for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
            tensors, _ = read_safetensors(path)
            self._add(tensors["rows"].tolist(), tensors["sum"])

    @property
    def missing(self) -> list[int]:
        """Texts that are still to be read."""
        done = {row for rows in self._rows for row in rows}
        return [row for row in range(self.count) if row not in done]

    def add(self, rows: list[int], means: torch.Tensor) -> None:
        """Take in a batch of texts.

        Args:
            rows: their places, [B].
            means: float64 [num_blocks, B, hidden].
        """
        total = means.sum(dim=1)
        if self._folder is not None:
            tensors = {"rows": torch.tensor(rows), "sum": total}
            if self.keep:
                tensors["means"] = means.float()
            write_safetensors(self._folder / f"{len(self._rows):06d}.safetensors", tensors, {"layout": "block, text"})
        elif self.keep:
            self._means.append(means.float())
        self._add(rows, total)

    def _add(self, rows: list[int], total: torch.Tensor) -> None:
        self._rows.append(rows)
        self._sum = total if self._sum is None else self._sum + total

    def mean(self) -> torch.Tensor:
        """Mean over the texts, float64 [num_blocks, hidden]."""
        assert self._sum is not None
        return self._sum / self.count

    def block(self, block: int) -> torch.Tensor:
        """Every text's mean at one block, float32 [n, hidden], in the texts' order."""
        if self._folder is None:
            parts = [means[block] for means in self._means]
        else:
            parts = [_slice(path, block) for path in sorted(self._folder.glob("*.safetensors"))]
        found = torch.cat(parts)
        order = torch.tensor([row for rows in self._rows for row in rows])
        return torch.empty_like(found).index_copy_(0, order, found)


def _slice(path: Path, block: int) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        found: torch.Tensor = file.get_slice("means")[block]
    return found


@torch.no_grad()
def read_means(
    model: nn.Module,
    texts: Sequence[TokenizedText],
    into: TextMeans,
    *,
    positions: str = "response_avg",
    batch_size: int = 32,
    label: str = "texts",
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Read the texts that `into` lacks: one forward a batch for all blocks, longest texts first.

    Rows are padded on the right, whatever side the tokenizer pads on, see `padded`. Dropout is off meanwhile.

    Args:
        model: a Hugging Face decoder.
        texts: all n texts.
        into: takes the means.
        positions: one of `POSITIONS`.
        batch_size: texts a forward.
        label: what to call the texts in an error.
        on_batch: called with the number of texts after every batch.

    Raises:
        PersonafastError: no texts, one without tokens at those positions, or activations that are not finite.
        UnsupportedModelError: the model's blocks were not found.
    """
    spans = find_spans(texts, positions, label)
    parts = anatomy(model)
    device = input_device(model)
    chosen: list[int] = []
    seen: dict[int, torch.Tensor] = {}

    def reads(block: int) -> Callable[[torch.Tensor], None]:
        def see(hidden: torch.Tensor) -> None:
            # hidden: [B, L, H]. Row by row, because a float64 copy of the whole of it would be the largest tensor here.
            seen[block] = torch.stack(
                [hidden[row, slice(*spans[text])].double().mean(dim=0) for row, text in enumerate(chosen)]
            )

        return see

    with evaluating(model), Reader() as reader:
        for index, block in enumerate(parts.blocks):
            reader.on_output(block, reads(index))
        todo = into.missing
        for places in longest_first([len(texts[row].ids) for row in todo], batch_size):
            chosen = [todo[place] for place in places]
            forward(model, *padded([texts[row].ids for row in chosen], device))
            means = torch.stack([seen[block].cpu() for block in range(len(parts.blocks))])
            _check_finite(means, chosen, label)
            into.add(chosen, means)
            if on_batch is not None:
                on_batch(len(chosen))


def find_spans(texts: Sequence[TokenizedText], positions: str, label: str) -> list[tuple[int, int]]:
    """Every text's `span`; errors name the text by `label` and place.

    Raises:
        PersonafastError: no texts, or one without tokens at those positions.
    """
    if not texts:
        raise PersonafastError(f"{label}: empty; give at least one text on each side of the contrast")
    spans = []
    for index, text in enumerate(texts):
        try:
            spans.append(text.span(positions))
        except PersonafastError as error:
            raise PersonafastError(f"{label}, text {index}: {error}") from None
    return spans


def _check_finite(means: torch.Tensor, rows: list[int], label: str) -> None:
    broken = (~torch.isfinite(means).all(dim=2)).nonzero()
    if len(broken):
        block, row = broken[0].tolist()
        raise PersonafastError(
            f"{label}, text {rows[row]}: NaN or infinity at the output of block {block}; load the model in a wider "
            "dtype, or drop that text"
        )
