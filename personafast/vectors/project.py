"""How far every token of a text points along persona vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personafast.errors import PersonafastError
from personafast.models.anatomy import ModelShape, anatomy
from personafast.models.reading import Reader, TokenizedText, evaluating, forward, input_device, longest_first, padded
from personafast.vectors.blend import acting_blocks, checked_norms
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector

Text = str | Sequence[dict[str, str]] | TokenizedText


@dataclass(frozen=True)
class Projection:
    """One text of T tokens on persona directions.

    Attributes:
        ids: token ids, int64 [T].
        tokens: the text of every token, with the space before a word.
        response: how many tokens at the end are the response; all of a plain text.
        blocks: name -> the 0-based blocks whose output was projected on that vector, B of them.
        values: name -> h_t . v_b / |v_b|, float32 [T, B], in the units of the residual stream.
        cosines: name -> h_t . v_b / (|h_t| |v_b|), float32 [T, B], comparable between blocks.
    """

    ids: torch.Tensor
    tokens: tuple[str, ...]
    response: int
    blocks: Mapping[str, tuple[int, ...]]
    values: Mapping[str, torch.Tensor]
    cosines: Mapping[str, torch.Tensor]

    def means(self, name: str) -> torch.Tensor:
        """Mean projection over the response's tokens, float32 [B]."""
        return self.values[name][-self.response :].mean(dim=0)


@torch.no_grad()
def project(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    vectors: Mapping[str, PersonaVector],
    *,
    blocks: Sequence[int] | None = None,
    batch_size: int = 32,
    on_texts: Callable[[int], None] | None = None,
) -> list[Projection]:
    """Project the residual stream h_t at the output of block b on every vector: h_t . v_b / |v_b|, for every token t.

    One forward pass a batch for all vectors and blocks. Activations are reduced to their projections as they pass, so
    what is kept is four bytes a token, vector and block, and twice that with the cosines.

    Args:
        model: a Hugging Face decoder, on any device; dropout is off meanwhile.
        tokenizer: its tokenizer.
        texts: plain texts; chats whose last message is the assistant's; or token ids.
        vectors: the vectors by name.
        blocks: project at these; None takes each vector's own blocks.
        batch_size: texts a forward pass; the projections do not depend on it, but for rounding.
        on_texts: called with the number of texts of every finished batch, for progress bars.

    Returns:
        One `Projection` a text, in the order of `texts`.

    Raises:
        PersonafastError: no texts or vectors, a text without tokens, a vector of another width, number of blocks or
            hook point, a block out of range or missing, or a vector of norm zero at a block asked for.
    """
    if isinstance(texts, str):
        raise PersonafastError("texts: one text alone; give a list of texts")
    if not texts:
        raise PersonafastError("texts: empty; give at least one text")
    if not vectors:
        raise PersonafastError("vectors: empty; give at least one vector")
    if batch_size < 1:
        raise PersonafastError(f"batch_size: {batch_size} is not at least 1")
    parts = anatomy(model)
    chosen = {name: _blocks(name, vector, parts.shape, blocks) for name, vector in vectors.items()}
    tokenized = [_tokenized(tokenizer, text) for text in texts]
    directions = {
        block: _unit_rows({name: vectors[name] for name in vectors if block in chosen[name]}, block)
        for block in sorted({block for each in chosen.values() for block in each})
    }
    found: list[Projection | None] = [None] * len(texts)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def projecting(block: int) -> Callable[[torch.Tensor], None]:
        def see(hidden: torch.Tensor) -> None:
            # hidden: [B, L, H]; unit: [N, H]; dots: [B, L, N]
            dots = hidden.float() @ directions[block].to(hidden.device).T
            norms = hidden.float().norm(dim=-1, keepdim=True)
            seen[block] = (dots.cpu(), (dots / norms).nan_to_num().cpu())

        return see

    device = input_device(model)
    with evaluating(model), Reader() as reader:
        for block in directions:
            reader.on_output(parts.blocks[block], projecting(block))
        for places in longest_first([len(text.ids) for text in tokenized], batch_size):
            forward(model, *padded([tokenized[place].ids for place in places], device))
            for row, place in enumerate(places):
                found[place] = _gather(tokenizer, tokenized[place], row, chosen, seen)
            if on_texts is not None:
                on_texts(len(places))
    return [each for each in found if each is not None]


def _gather(
    tokenizer: Any,
    text: TokenizedText,
    row: int,
    chosen: Mapping[str, tuple[int, ...]],
    seen: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
) -> Projection:
    """The tokens of one row of a batch, without its padding, by vector instead of by block."""
    places = {block: [name for name in chosen if block in chosen[name]] for block in seen}

    def of(which: int) -> dict[str, torch.Tensor]:
        return {
            name: torch.stack(
                [seen[block][which][row, : len(text.ids), places[block].index(name)] for block in blocks], dim=1
            )
            for name, blocks in chosen.items()
        }

    ids = torch.as_tensor(text.ids, dtype=torch.long)
    return Projection(ids, tuple(_spoken(tokenizer, text.ids)), text.response, dict(chosen), of(0), of(1))


def _tokenized(tokenizer: Any, text: Text) -> TokenizedText:
    if isinstance(text, TokenizedText):
        return text
    if isinstance(text, str):
        return TokenizedText.from_text(tokenizer, text)
    return TokenizedText.from_chat(tokenizer, text)


def _spoken(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What every token says. Decoded alone, a token of many tokenizers loses the space that its mark stands for."""
    marks = tokenizer.convert_ids_to_tokens(list(ids))
    texts = [tokenizer.decode([token]) for token in ids]
    return [
        f" {text}" if isinstance(mark, str) and mark[:1] in ("\u2581", "\u0120") and text[:1] != " " else text
        for mark, text in zip(marks, texts, strict=True)
    ]


def _unit_rows(vectors: Mapping[str, PersonaVector], block: int) -> torch.Tensor:
    """Directions of norm 1 at a block, float32 [N, H]."""
    rows = []
    for name, vector in vectors.items():
        row = vector.directions[block : block + 1].double()
        rows.append(row / checked_norms(name, [block], row, "a projection"))
    return torch.cat(rows).float()


def _blocks(name: str, vector: PersonaVector, shape: ModelShape, blocks: Sequence[int] | None) -> tuple[int, ...]:
    rows, hidden = vector.directions.shape
    if (rows, hidden) != (shape.num_blocks, shape.hidden_size):
        raise PersonafastError(
            f"vectors[{name!r}]: [{rows}, {hidden}], and the model has {shape.num_blocks} blocks of hidden size "
            f"{shape.hidden_size}; use a vector extracted from this model"
        )
    if vector.hook_point != BLOCK_OUTPUT:
        raise PersonafastError(
            f"vectors[{name!r}]: read at {vector.hook_point!r}, and what is projected is the output of blocks; "
            "extract it there"
        )
    chosen = acting_blocks(name, vector, blocks)
    if not chosen:
        raise PersonafastError("blocks: empty; name at least one block, or None for each vector's own")
    return chosen
