"""transformers' continuous batching, which packs the requests of many rows into one: who may speak there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from personafast.errors import PersonafastError
from personafast.models.wrappers import unwrapped

if TYPE_CHECKING:
    from personafast.models.patch import Patch

_NAME = "init_continuous_batching"


class BatchingNote:
    """An instance attribute around what makes a model's batching manager.

    It gives attention back to transformers, whose paged cache knows its own implementations only, and refuses what one
    packed row cannot carry. It is a partial of a method, so that a deep copy of the model has its own.
    """

    def __init__(self, patch: Patch) -> None:
        self._patch = patch
        self._model: Any = unwrapped(patch.model)
        self._ours: functools.partial[Any] | None = None
        inner = getattr(self._model, _NAME, None)
        if inner is not None and _NAME not in self._model.__dict__:
            self._ours = functools.partial(self._begin, inner)
            self._model.__dict__[_NAME] = functools.update_wrapper(self._ours, inner)

    def remove(self) -> None:
        """Take the attribute away; one that somebody else has put over it since stays."""
        if self._ours is not None and self._model.__dict__.get(_NAME) is self._ours:
            del self._model.__dict__[_NAME]

    def _begin(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self._patch.steering.rows
        if self._patch.speakers > 1 or (rows is not None and rows.shaped):
            raise PersonafastError(
                "personas: continuous batching packs all requests into one row, which takes one persona without "
                "positions or schedules: using([persona]); personas.generate takes one a row"
            )
        if self._patch.attention is not None:
            self._patch.attention.step_aside()
        return inner(*args, **kwargs)
