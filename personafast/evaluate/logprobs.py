"""Log-probabilities of given texts under a model, without storing logits where that can be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.errors import PersonafastError
from personafast.models.anatomy import anatomy
from personafast.models.context import learned_positions
from personafast.models.reading import input_device


class _Reached(Exception):
    """The head was reached: what it would have been given is known, and its logits are not wanted."""


@dataclass(frozen=True)
class Continuation:
    """A text to score: token ids `ids`, of which the last `scored` are the continuation; 0 < scored < len(ids)."""

    ids: Sequence[int]
    scored: int


class TextScorer:
    """log p(token | what stands before it), for the tokens of continuations.

    The head, its softmax and the choice of the token are one operator (`ops.token_logprobs`) wherever the model's
    logits are softcap(scale * (W h + b)): that is tried on the model itself, since no name says it. Otherwise logits
    are made, and dropped batch by batch.

    Args:
        model: a transformers causal LM, with personas in force or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = anatomy(model).head
        self._positions = learned_positions(model)
        self._form: tuple[float, float] | None = None
        self._tried = False

    @torch.no_grad()
    def score(self, texts: Sequence[Continuation], *, batch_size: int = 32) -> list[torch.Tensor]:
        """Float32 [scored] of every text, in the order given.

        Raises:
            PersonafastError: a text whose continuation is empty or has nothing before it, or that is longer than the
                model's table of positions.
        """
        for index, text in enumerate(texts):
            if not 0 < text.scored < len(text.ids):
                raise PersonafastError(
                    f"texts[{index}]: {text.scored} of {len(text.ids)} tokens are to be scored; give one at least, and "
                    "one before it"
                )
            if self._positions is not None and len(text.ids) > self._positions:
                raise PersonafastError(
                    f"texts[{index}]: {len(text.ids)} tokens, and the model has {self._positions} positions; shorten it"
                )
        found: list[torch.Tensor | None] = [None] * len(texts)
        # Texts of about one length share a batch.
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index].ids))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, values in zip(chosen, self._batch([texts[i] for i in chosen]), strict=True):
                found[index] = values
        return [values for values in found if values is not None]

    def _batch(self, texts: Sequence[Continuation]) -> list[torch.Tensor]:
        device = input_device(self._model)
        length = max(len(text.ids) for text in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        live = torch.zeros(len(texts), length, dtype=torch.long)
        # The place before a scored token is where its probability stands.
        places = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            count = len(text.ids)
            ids[row, :count] = torch.as_tensor(text.ids)
            live[row, :count] = 1
            places[row, count - text.scored - 1 : count - 1] = True
        tokens = ids.roll(-1, 1)[places].to(device)
        inputs = {"input_ids": ids.to(device), "attention_mask": live.to(device), "use_cache": False}
        values = self._values(inputs, places.to(device), tokens).cpu()
        return list(values.split([text.scored for text in texts]))

    def _values(self, inputs: dict[str, Any], places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        form = self._form_of(inputs)
        if form is None:
            logits = self._model(**inputs).logits[places]
            return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        head: Any = self._head
        hidden = self._hidden(inputs)[places]
        scale, softcap = form
        return ops.token_logprobs(hidden, head.weight, tokens, bias=head.bias, logit_scale=scale, softcap=softcap)

    def _hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the head is given, [B, L, H]; the head itself does not run."""
        seen: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        assert self._head is not None
        hook = self._head.register_forward_pre_hook(stop)
        try:
            self._model(**inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        return seen[0]

    def _form_of(self, inputs: dict[str, Any]) -> tuple[float, float] | None:
        """(scale, softcap) by which the head's output becomes the logits, or None where it does so otherwise."""
        if self._tried:
            return self._form
        self._tried = True
        head: Any = self._head
        if head is None or type(head.weight) not in (torch.Tensor, nn.Parameter) or not head.weight.is_floating_point():
            return None
        config: Any = self._model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        few = {**inputs, "input_ids": inputs["input_ids"][:1, :4], "attention_mask": inputs["attention_mask"][:1, :4]}
        logits = self._model(**few).logits.float()
        hidden = self._hidden(few)
        if hidden.shape[:2] != logits.shape[:2] or hidden.dtype != head.weight.dtype:
            return None
        plain = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
        softcap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
        scales = [1.0, getattr(text, "logit_scale", None), 1 / (getattr(text, "logits_scaling", None) or 1.0)]
        tolerance = 8 * torch.finfo(head.weight.dtype).eps
        for scale in scales:
            if not isinstance(scale, (int, float)):
                continue
            form = plain * scale
            form = softcap * torch.tanh(form / softcap) if softcap else form
            if torch.allclose(form, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max())):
                self._form = (float(scale), softcap)
                break
        return self._form
