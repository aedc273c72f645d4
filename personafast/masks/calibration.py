"""One pass over the texts of a persona: what every linear of the blocks gets to see."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personafast.errors import PersonafastError
from personafast.masks.sources import CalibrationText, tokenize
from personafast.masks.statistics import CalibrationStatistics, ChannelSums, check_settings
from personafast.masks.targets import Targets, expert_inputs, find_targets
from personafast.models.reading import TokenizedText, batches, evaluating, few_logits, input_device
from personafast.models.wrappers import unwrapped

Progress = Callable[[int, int], None]

# Of an activation, so many numbers at once are widened to float64.
_ELEMENTS = 1 << 24


class _RoutedError(Exception):
    """A linear saw rows that do not tell which tokens they are."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[TokenizedText | CalibrationText | str] | None = None,
    *,
    batch_size: int = 32,
    tokens: str = "response",
    padding_side: str = "right",
    max_length: int | None = None,
    progress: Progress | None = None,
    save_to: str | Path | None = None,
    save_every: int = 8,
) -> CalibrationStatistics:
    """Gather statistics of the inputs x of every linear of the blocks, in one pass.

    Sums run in float64; a token counts once, padding never. Experts count the tokens that are routed to them, and only
    those. Where a linear's input does not say which tokens its rows are (experts that are modules of their own), texts
    go through one by one, the response after the prompt by way of the cache, so that what is seen is what counts.

    Args:
        model: a decoder; it runs in evaluation mode, and is left as it was.
        tokenizer: its tokenizer; not needed for texts that are tokenised (`calibrate(model, texts)`).
        texts: the persona's texts.
        batch_size: texts at once, longest first.
        tokens: ``response`` counts the tokens of responses; ``all`` those of prompts too, as the paper does. Of a plain
            text every token is response.
        padding_side: ``right`` or ``left``; positions are given to the model where padding is on the left.
        max_length: tokens of a text that are used, from its start; None for all.
        progress: called with (batches done, batches in all).
        save_to: file that the statistics are written to every `save_every` batches and at the end. If it is there, what
            it says is done is not done again.
        save_every: batches between two writes.

    Returns:
        The statistics; as a mapping, module path -> mean of |x_j|, float64 [in].

    Raises:
        PersonafastError: no texts, a text without tokens, a NaN or infinite activation (names the linear), an unknown
            option, or a file of other texts, settings or another model.
    """
    if texts is None:
        tokenizer, texts = None, tokenizer
    if not texts:
        raise PersonafastError("texts: empty; give at least one calibration text")
    if tokens not in ("response", "all"):
        raise PersonafastError(f"tokens: {tokens!r} is unknown; choose response or all")
    if padding_side not in ("right", "left"):
        raise PersonafastError(f"padding_side: {padding_side!r} is unknown; choose right or left")
    for name, value in (("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise PersonafastError(f"{name}: {value}; give 1 or more")
    tokenized = [tokenize(tokenizer, text, max_length) for text in texts]
    targets = find_targets(model)
    settings = {"tokens": tokens}
    run = {"batch_size": batch_size, "padding_side": padding_side, "max_length": max_length}
    total = -(-len(tokenized) // batch_size)
    key = _fingerprint(tokenized)
    known = _resume(save_to, targets, settings, key, run)
    sums = known.sums if known else {path: ChannelSums.zeros(target.features[1]) for path, target in targets.items()}
    start = known.runs[key]["seen"] if known else 0

    def statistics(seen: int) -> CalibrationStatistics:
        runs = {key: {**run, "seen": seen, "batches": total}}
        return CalibrationStatistics(sums, targets.parts.shape, settings, runs)

    device = input_device(model)
    watch = _Watch(targets)
    with watch.hooked(), evaluating(model):
        for seen, (ids, live, response) in enumerate(batches(tokenized, batch_size, device), 1):
            if seen > start:
                chosen = response if tokens == "response" else live.bool()
                for path, part in watch.batch(model, ids, live, chosen, padding_side).items():
                    sums[path].add(part)
                if save_to is not None and (seen == total or seen % save_every == 0):
                    statistics(seen).save(save_to)
            if progress is not None:
                progress(seen, total)
    return statistics(total)


def _resume(
    save_to: str | Path | None, targets: Targets, settings: dict[str, Any], key: str, run: dict[str, Any]
) -> CalibrationStatistics | None:
    if save_to is None or not Path(save_to).exists():
        return None
    found = CalibrationStatistics.load(save_to)
    if found.shape != targets.parts.shape or set(found.sums) != set(targets):
        raise PersonafastError(f"{save_to}: statistics of another model; give another file")
    if len(found.runs) != 1:
        raise PersonafastError(
            f"{save_to}: merged of {len(found.runs)} calibrations; give another file to calibrate into"
        )
    ((known, facts),) = found.runs.items()
    made = {name: facts[name] for name in run}
    check_settings({**found.settings, **made}, {**settings, **run}, str(save_to))
    if known != key:
        raise PersonafastError(f"{save_to}: statistics of other texts; repeat those, or give another file")
    return found


def _fingerprint(texts: Sequence[TokenizedText]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr((list(text.ids), text.response)).encode())
    return digest.hexdigest()


class _Watch:
    """Hooks on the linears, and the sums of the batch that is passing through them."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._sums: dict[str, ChannelSums] = {}
        self._chosen: torch.Tensor | None = None
        # The last input seen and its sums: the projections of one attention or MLP read the same tensor.
        self._last: tuple[torch.Tensor, ChannelSums] | None = None
        self._singly = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the model inside the `with`."""
        hooks = [
            target.module.register_forward_pre_hook(self._linear(path))
            for path, target in self._targets.items()
            if target.expert is None
        ]
        hooks += [
            module.register_forward_pre_hook(self._experts(path), with_kwargs=True)
            for path, module in self._targets.experts.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def batch(
        self, model: nn.Module, ids: torch.Tensor, live: torch.Tensor, chosen: torch.Tensor, side: str
    ) -> dict[str, ChannelSums]:
        """The sums of one batch, ids, live and chosen [B, L], right-padded."""
        self._sums = {}
        if not self._singly:
            try:
                self._together(model, ids, live, chosen, side)
                return self._sums
            except _RoutedError:
                self._singly, self._sums = True, {}
        for row in range(ids.shape[0]):
            self._alone(model, ids[row, : int(live[row].sum())], chosen[row])
        return self._sums

    def _together(
        self, model: nn.Module, ids: torch.Tensor, live: torch.Tensor, chosen: torch.Tensor, side: str
    ) -> None:
        options: dict[str, Any] = {}
        if side == "left":
            lengths = live.sum(1).tolist()
            ids, live, chosen = (
                torch.stack([row.roll(len(row) - length) for row, length in zip(part, lengths, strict=True)])
                for part in (ids, live, chosen)
            )
            if "position_ids" in inspect.signature(unwrapped(model).forward).parameters:
                options["position_ids"] = (live.cumsum(1) - 1).clamp(min=0)
        self._pass(model, ids, chosen, attention_mask=live, use_cache=False, **options)

    def _alone(self, model: nn.Module, ids: torch.Tensor, chosen: torch.Tensor) -> None:
        # Everything that goes through while `_chosen` is set counts: first what does not, then the rest from the cache.
        start = int(chosen.int().argmax())
        cache = None
        if start:
            cache = self._pass(model, ids[None, :start], None, use_cache=True).past_key_values
        rest = ids[None, start:]
        self._pass(model, rest, torch.ones_like(rest, dtype=torch.bool), past_key_values=cache, use_cache=start > 0)

    def _pass(self, model: nn.Module, ids: torch.Tensor, chosen: torch.Tensor | None, **options: Any) -> Any:
        self._chosen, self._last = chosen, None
        try:
            return model(input_ids=ids, **options, **few_logits(model))
        finally:
            self._chosen, self._last = None, None

    def _linear(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self._chosen is not None:
                self._see(path, args[0])

        return see

    def _see(self, path: str, x: torch.Tensor) -> None:
        assert self._chosen is not None
        if self._last is not None and self._last[0] is x:
            self._keep(path, self._last[1])
            return
        chosen = self._chosen.to(x.device)
        if self._singly:  # one text, and all that passes counts
            x_rows = x.reshape(-1, x.shape[-1])
            sums = _sums(x_rows, chosen.new_zeros(x_rows.shape[0], dtype=torch.long))
        elif x.shape[:-1] == chosen.shape:
            sums = _sums(x[chosen], chosen.nonzero()[:, 0])
        elif x.dim() == 2 and x.shape[0] == chosen.numel() and not _is_routed(path):
            sums = _sums(x[chosen.flatten()], chosen.nonzero()[:, 0])
        else:
            raise _RoutedError
        self._last = (x, sums)
        self._keep(path, sums)

    def _experts(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        signature = inspect.signature(type(self._targets.experts[path]).forward)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._chosen is None:
                return
            hidden, index = list(signature.bind(module, *args, **kwargs).arguments.values())[1:3]
            chosen = self._chosen.to(hidden.device)
            rows, where = hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])
            if rows.shape[0] != chosen.numel() or where.shape[0] != chosen.numel():
                raise PersonafastError(f"model: {path} was called with other tokens than the batch's; cannot calibrate")
            text = torch.arange(chosen.shape[0], device=hidden.device).repeat_interleave(chosen.shape[1])
            for expert in where[chosen.flatten()].unique().tolist():
                mine = chosen.flatten() & (where == expert).any(1)
                if f"{path}.down_proj.{expert}" not in self._targets:
                    continue  # the sentinel of another rank's expert
                for name, x in expert_inputs(module, expert, rows[mine]).items():
                    self._keep(f"{path}.{name}.{expert}", _sums(x, text[mine]))

        return see

    def _keep(self, path: str, sums: ChannelSums) -> None:
        if not bool(torch.isfinite(sums.squares).all()):
            raise PersonafastError(
                f"texts: the inputs of {path} are NaN or infinite; check the model's weights, or load it in float32 or "
                "bfloat16"
            )
        if path in self._sums:
            self._sums[path].add(sums)
        else:
            # Its own copy: `add` writes into it, and linears that read one tensor share these sums.
            self._sums[path] = ChannelSums.zeros(sums.total.numel())
            self._sums[path].add(sums)


def _is_routed(path: str) -> bool:
    """Whether a linear belongs to one module of a list inside its block, as experts do: a router chooses its rows."""
    return sum(part.isdigit() for part in path.split(".")) > 1


def _sums(x: torch.Tensor, texts: torch.Tensor) -> ChannelSums:
    """Sums over the rows of x [T, I]; texts [T] says which text each row belongs to, in ascending order."""
    _, counts = texts.unique_consecutive(return_counts=True)
    # Whole vectors of columns, so that torch adds up every column in the same order as in one piece.
    step = max(1, _ELEMENTS // max(1, x.shape[0]) // 64) * 64
    parts = [_column_sums(part, counts.tolist()) for part in x.split(step, dim=1)]
    absolute, squares, total, norms = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return ChannelSums(absolute, squares, total, norms, x.shape[0], int(counts.numel()))


def _column_sums(x: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
    wide = x.double()
    squares = wide.square()
    norms = wide.new_zeros(x.shape[1])
    for part in squares.split(counts):
        norms += part.sum(dim=0).sqrt()
    return wide.abs().sum(dim=0), squares.sum(dim=0), wide.sum(dim=0), norms
