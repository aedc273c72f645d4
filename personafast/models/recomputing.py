"""Gradient checkpointing: a block that is computed again in the backward pass carries what it carried before.

By then the `with` of its personas is over, or another one is in force.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.models.patch import Patch

_NAME = "_gradient_checkpointing_func"


class Recomputing:
    """Wraps the function that modules of a model checkpoint themselves with.

    transformers sets it when checkpointing is enabled, before or after `attach`, so it is looked for as a pass begins.

    Args:
        patch: what says who speaks.
        modules: those that may checkpoint: the blocks and what calls them.
    """

    def __init__(self, patch: Patch, modules: Iterable[nn.Module]) -> None:
        self._patch, self._modules = patch, tuple(modules)
        self._removed = False

    def begin(self) -> None:
        """A pass begins: wrap what is not wrapped yet."""
        if not torch.is_grad_enabled():
            return
        for module in self._modules:
            checkpoint = module.__dict__.get(_NAME)
            if checkpoint is not None and not self._is_ours(checkpoint):
                module.__dict__[_NAME] = functools.partial(self._checkpoint, checkpoint)

    def remove(self) -> None:
        """Take the wrappers away. What was computed before can no longer be computed again as it was."""
        for module in self._modules:
            checkpoint: Any = module.__dict__.get(_NAME)
            if self._is_ours(checkpoint):
                module.__dict__[_NAME] = checkpoint.args[0]
        self._removed = True

    def _is_ours(self, checkpoint: Any) -> bool:
        return isinstance(checkpoint, functools.partial) and checkpoint.func == self._checkpoint

    def _checkpoint(self, checkpoint: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(self._as_then, self._patch.carried, function), *args, **kwargs)

    def _as_then(self, carried: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if self._removed and any(carried):
            raise PersonafastError(
                "detach: a checkpointed pass with personas is computed again now, after they were taken off; call "
                "backward() before detach()"
            )
        with self._patch.carrying(carried):
            return function(*args, **kwargs)
