"""Persona vectors from contrasting texts: the difference of mean activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personafast.errors import PersonafastError
from personafast.models.anatomy import anatomy
from personafast.models.reading import Reader, TokenizedText, batches
from personafast.vectors.vector import PersonaVector


@dataclass(frozen=True)
class Contrast:
    """Chats that show a trait and chats that do not; the last message of each is the assistant's response."""

    positive: Sequence[Sequence[dict[str, str]]]
    negative: Sequence[Sequence[dict[str, str]]]


@torch.no_grad()
def mean_activations(model: nn.Module, texts: Sequence[TokenizedText], *, batch_size: int = 32) -> torch.Tensor:
    """Mean over texts of the mean over each text's response tokens, at every block's output.

    Every text weighs the same however long its response is (arXiv 2510.10157). Only running sums are kept.

    Returns:
        float64 [num_blocks, hidden].

    Raises:
        PersonafastError: no texts, or a text without response tokens.
    """
    if not texts:
        raise PersonafastError("texts: empty; give at least one text on each side of the contrast")
    if any(text.response < 1 for text in texts):
        raise PersonafastError("texts: a response has no tokens; drop that text")
    parts = anatomy(model)
    sums = torch.zeros(parts.shape.num_blocks, parts.shape.hidden_size, dtype=torch.float64)
    weights: torch.Tensor | None = None

    def accumulate(block: int) -> Callable[[torch.Tensor], None]:
        def see(hidden: torch.Tensor) -> None:
            # hidden: [B, L, H]; weights: [B, L], each row sums to 1
            assert weights is not None
            sums[block] += torch.einsum("bl,blh->h", weights.to(hidden.device), hidden.double()).cpu()

        return see

    device = next(model.parameters()).device
    with Reader() as reader:
        for index, block in enumerate(parts.blocks):
            reader.on_output(block, accumulate(index))
        for ids, live, response in batches(texts, batch_size, device):
            weights = response.double() / response.sum(dim=1, keepdim=True)
            model(input_ids=ids, attention_mask=live, use_cache=False)
    return sums / len(texts)


def extract_vectors(
    model: nn.Module,
    tokenizer: Any,
    contrasts: Mapping[str, Contrast],
    *,
    blocks: Sequence[int] = (),
    batch_size: int = 32,
    on_trait: Callable[[str], None] | None = None,
) -> dict[str, PersonaVector]:
    """v_b = mean over positive responses of h_b minus the same mean over negative ones, at every block b.

    Args:
        model: a Hugging Face decoder, on any device.
        tokenizer: its tokenizer, with a chat template.
        contrasts: trait -> chats with and without it.
        blocks: blocks the vectors act on by default; empty takes `default_blocks`.
        batch_size: texts a forward pass.
        on_trait: called with each trait's name when it is done, for progress bars.

    Returns:
        trait -> vector, float32 [num_blocks, hidden].
    """
    found = {}
    for name, contrast in contrasts.items():
        sides = [
            mean_activations(model, [TokenizedText.from_chat(tokenizer, chat) for chat in chats], batch_size=batch_size)
            for chats in (contrast.positive, contrast.negative)
        ]
        metadata = {"method": "mean_diff", "positive": len(contrast.positive), "negative": len(contrast.negative)}
        found[name] = PersonaVector((sides[0] - sides[1]).float(), blocks, metadata)
        if on_trait is not None:
            on_trait(name)
    return found
