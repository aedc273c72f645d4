"""Masks as the authors of persona subnetworks (arXiv 2602.07164) save them.

Their scripts write one file a linear and persona, `M_{persona}_{module}.pt`: a bool tensor [out, in], True where the
weight is kept, one byte a weight, where `module` is the name that `model.named_modules()` gives and persona is `seek`
or `reject`. One of their scripts masks `lm_head` too, which is refused here unless it is left out by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from personafast import ops
from personafast.errors import FormatError, PersonafastError
from personafast.masks.mask import PersonaMask
from personafast.masks.targets import find_targets, refuse_unknown

_NAME = re.compile(r"M_([^_]+)_(.+)\.pt")


def read_authors_masks(
    folder: str | Path, model: nn.Module, *, partial: bool = False, leave_out: Sequence[str] = ()
) -> dict[str, PersonaMask]:
    """Read a folder of `M_{persona}_{module}.pt`: persona -> mask.

    Files are loaded with `weights_only=True`, so that nothing in them runs, and one at a time.

    Args:
        folder: where the files are; others in it are ignored.
        model: the model they were made from; it is not changed.
        partial: accept masks that lack some of the model's linears, which then keep all their weights.
        leave_out: patterns of modules to skip, such as ``lm_head``.

    Raises:
        FormatError: there is no such file, one is broken or not a bool matrix, its module is not the model's or has
            another shape, or, without `partial`, a linear of the model has no file.
        PersonafastError: a mask over the head or an embedding, or a pattern that no file matches.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; give the folder that holds M_seek_*.pt")
    found = [(file, match) for file in sorted(folder.iterdir()) if (match := _NAME.fullmatch(file.name))]
    if not found:
        raise FormatError(f"{folder}: holds no M_<persona>_<module>.pt; give the folder that the authors' script wrote")
    for pattern in leave_out:
        if not any(fnmatch.fnmatchcase(match[2], pattern) for _, match in found):
            raise PersonafastError(f"leave_out: {pattern!r} matches no module of {folder}; give a name such as lm_head")
    features = {path: target.features for path, target in find_targets(model).items() if target.expert is None}
    words: dict[str, dict[str, torch.Tensor]] = {}
    for file, match in found:
        persona, path = match.groups()
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in leave_out):
            continue
        if path not in features:
            raise _refuse_module(model, file, path)
        words.setdefault(persona, {})[path] = ops.pack_mask(_read(file, features[path]))
    masks: dict[str, PersonaMask] = {}
    for persona, own in words.items():
        missing = [path for path in features if path not in own]
        skipped = [path for path in missing if any(fnmatch.fnmatchcase(path, pattern) for pattern in leave_out)]
        if len(missing) > len(skipped) and not partial:
            first = next(path for path in missing if path not in skipped)
            raise FormatError(
                f"{folder / f'M_{persona}_{first}.pt'}: no such file; {len(missing)} of {len(features)} linears lack "
                "theirs; copy the whole folder, or ask for a partial mask"
            )
        ordered = {path: own[path] for path in features if path in own}
        widths = {path: features[path][1] for path in ordered}
        masks[persona] = PersonaMask(ordered, widths, {"method": "imported", "persona": persona})
    if not masks:
        raise PersonafastError(f"leave_out: leaves nothing of {folder}; drop a pattern")
    return masks


def _refuse_module(model: nn.Module, file: Path, path: str) -> PersonafastError:
    refused = refuse_unknown(model, path, str(file))
    if "never masked" in str(refused):
        return PersonafastError(f"{refused} with leave_out (--leave-out {path})")
    return FormatError(f"{file}: the model has no linear {path!r} that can be masked; give the model it was made from")


def _read(file: Path, features: tuple[int, int]) -> torch.Tensor:
    try:
        mask = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its reader stumbles over
        reason = str(error).strip().splitlines()
        raise FormatError(
            f"{file}: truncated or not a tensor of torch.save ({reason[0] if reason else error!r}); copy it again"
        ) from None
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.layout != torch.strided:
        what = f"{mask.dtype} ({mask.layout})" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise FormatError(f"{file}: holds {what}, expected a bool tensor [out, in]; save it with .bool()")
    if tuple(mask.shape) != features:
        raise FormatError(f"{file}: is {list(mask.shape)}, the model's linear is {list(features)}; give its own model")
    return mask
