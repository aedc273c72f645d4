"""Training-free persona masks from activation statistics (arXiv 2602.07164, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.errors import PersonafastError
from personafast.masks import scores
from personafast.masks.mask import PersonaMask, check_gamma
from personafast.masks.selection import best_of_all, best_of_rows
from personafast.masks.sparsity import Sparsity, resolve
from personafast.masks.statistics import (
    MOMENTS,
    STATISTICS,
    CalibrationStatistics,
    check_settings,
    different_model,
)
from personafast.masks.targets import Target, Targets, find_targets, refuse_unknown

Statistics = CalibrationStatistics | Mapping[str, torch.Tensor]

SCORES = ("wanda", "contrastive_wanda", "contrastive_sparse", "magnitude", "random")
GROUPS = ("row", "layer", "global")
# Weights scored at once.
_CHUNK = 1 << 22


def check_options(
    *,
    score: str = "wanda",
    statistic: str = "mean_abs",
    z_of: str = "x",
    group: str = "row",
    gamma: float = 0.0,
    seed: int = 0,
) -> None:
    """Raise `PersonafastError`, naming the option, unless `build_mask` takes these; before a long calibration, say."""
    for name, value, known in (
        ("score", score, SCORES),
        ("statistic", statistic, STATISTICS),
        ("z_of", z_of, MOMENTS),
        ("group", group, GROUPS),
    ):
        if value not in known:
            raise PersonafastError(f"{name}: {value!r} is unknown; choose one of {', '.join(known)}")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise PersonafastError(f"seed: {seed} is not in [0, 2**63)")
    check_gamma(gamma)


@torch.no_grad()
def build_mask(
    model: nn.Module,
    statistics: Statistics,
    *,
    sparsity: Sparsity = 0.5,
    score: str = "wanda",
    statistic: str = "mean_abs",
    against: CalibrationStatistics | None = None,
    z_of: str = "x",
    group: str = "row",
    gamma: float = 0.0,
    seed: int = 0,
    experts: bool = False,
) -> PersonaMask:
    """Keep the weights of the highest score S; of equal scores, the smaller index is kept.

    With A = `statistics.of(statistic)`, and + for these statistics, - for `against`:

    - ``wanda``: S_ij = |W_ij| A_j;
    - ``contrastive_wanda``: |W_ij| relu(z_j), z = (mu+ - mu-) / (sqrt(var+ + var-) + 1e-6), ties by |W_ij| A_j;
    - ``contrastive_sparse``: S+ and S- divided by their rows' sums; what S+ wants more comes first, and within it the
      larger S+;
    - ``magnitude``: |W_ij|, and ``random``: uniform numbers, the same on every machine.

    Args:
        model: the model the statistics were gathered from.
        statistics: from `calibrate`, or module path -> A [in].
        sparsity: share of weights dropped, 0 <= sparsity < 1; or by module class and path (see `sparsity.resolve`), as
            in ``{"attention": 0.3, "mlp": 0.6}``.
        score: which score.
        statistic: ``mean_abs``, ``l2`` or ``sample_l2``.
        against: statistics of the opposing persona, for the contrastive scores.
        z_of: mean and variance of z are those of ``x`` over tokens, or of ``sample_l2``, the L2 norms of texts (the
            authors' code).
        group: weights are compared within a ``row``, a ``layer`` (one linear), or ``global``, over all linears that go
            by the same key of `sparsity`. round((1 - sparsity) n) of a group's n weights are kept.
        gamma: what the dropped weights are multiplied with, 0 <= gamma <= 1: the soft gate M + gamma (1 - M).
        seed: of ``random``.
        experts: also mask experts that share one fused parameter, one by one. Off by default, since `attach` does not
            run such masks; the parameters left out are listed in ``metadata["left_out"]``.

    Returns:
        The mask. Its metadata says how it was made; ``unseen`` lists experts that no token reached, which are masked by
        magnitude.

    Raises:
        PersonafastError: an option out of range, statistics of another model or width, NaN or negative statistics
            (names the linear), the head or an embedding among them.
    """
    check_options(score=score, statistic=statistic, z_of=z_of, group=group, gamma=gamma, seed=seed)
    contrastive = score.startswith("contrastive")
    if contrastive and against is None:
        raise PersonafastError(f"against: {score} needs the statistics of the opposing persona")
    targets = find_targets(model)
    own = _checked(model, targets, statistics, statistic)
    made: dict[str, Any] = {"method": score, "statistic": statistic}
    if contrastive:
        assert against is not None
        sides = _sides(statistics, against)
        other = _checked(model, targets, against, statistic)
        if score == "contrastive_sparse":
            scorer = scores.contrastive_sparse(own, other)
        else:
            scorer = scores.contrastive_wanda(_differences(*sides, z_of), own)
            made["z_of"] = z_of
    elif score == "random":
        scorer = scores.random(seed)
        made = {"method": score, "seed": seed}
    elif score == "magnitude":
        scorer = scores.magnitude
        made = {"method": score}
    else:
        scorer = scores.wanda(own)
    return _build(model, targets, own, scorer, made, sparsity, group, gamma, experts)


@torch.no_grad()
def build_opposing_masks(
    model: nn.Module,
    positive: CalibrationStatistics,
    negative: CalibrationStatistics,
    *,
    score: str = "contrastive_wanda",
    **options: Any,
) -> tuple[PersonaMask, PersonaMask]:
    """The masks of two opposing personas, each against the other; options as for `build_mask`.

    Returns:
        (mask of `positive`, mask of `negative`); ``metadata["overlap"]`` is the share of the kept weights of both that
        both keep (Jaccard).

    Raises:
        PersonafastError: as `build_mask`, or sides of unequal numbers of texts.
    """
    _sides(positive, negative)
    first = build_mask(model, positive, score=score, against=negative, **options)
    second = build_mask(model, negative, score=score, against=positive, **options)
    overlap = round(first.overlap(second), 6)
    return first.with_metadata(overlap=overlap), second.with_metadata(overlap=overlap)


@torch.no_grad()
def mix_masks(
    model: nn.Module,
    statistics: Mapping[str, Statistics],
    weights: Mapping[str, float],
    *,
    sparsity: Sparsity = 0.5,
    statistic: str = "mean_abs",
    group: str = "row",
    gamma: float = 0.0,
    experts: bool = False,
) -> PersonaMask:
    """The mask of a mixture of personas: keep the highest sum_p w_p S^p_ij / sum_j S^p_ij, S^p = |W_ij| A^p_j.

    Args:
        model: the model the statistics were gathered from.
        statistics: persona -> its statistics.
        weights: persona -> its weight, positive; ``{"introvert": 0.7, "thinker": 0.3}``.
        sparsity: as for `build_mask`, as are the other options.
        statistic: which A.
        group: what is compared with what.
        gamma: of the soft gate.
        experts: also mask fused experts.

    Raises:
        PersonafastError: a weight that is not positive, a persona without statistics, or as `build_mask`.
    """
    check_options(statistic=statistic, group=group, gamma=gamma)
    if not weights:
        raise PersonafastError("weights: empty; give each persona a weight, as in {'introvert': 0.7}")
    for name, weight in weights.items():
        if name not in statistics:
            raise PersonafastError(f"weights[{name!r}]: no such statistics; there are: {', '.join(sorted(statistics))}")
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise PersonafastError(f"weights[{name!r}]: {weight} is not a positive number")
    targets = find_targets(model)
    own = {name: _checked(model, targets, statistics[name], statistic) for name in weights}
    first, *others = own.values()
    if any(set(other) != set(first) for other in others):
        raise PersonafastError("statistics: over different linears; calibrate all personas on this model")
    made = {"method": "mixture", "statistic": statistic, "weights": dict(sorted(weights.items()))}
    scorer = scores.mixture(own, weights)
    # A linear counts as seen where any persona's texts reach it.
    seen = {path: sum(side[path] for side in own.values()) for path in first}
    return _build(model, targets, seen, scorer, made, sparsity, group, gamma, experts)


def _build(
    model: nn.Module,
    targets: Targets,
    own: Mapping[str, Any],
    scorer: scores.Score,
    made: dict[str, Any],
    sparsity: Sparsity,
    group: str,
    gamma: float,
    experts: bool,
) -> PersonaMask:
    paths = [path for path in own if experts or targets[path].expert is None]
    left_out = sorted({path.rpartition(".")[0] for path in own if path not in paths}) + list(targets.left_out)
    chosen = resolve(model, paths, sparsity)
    unseen = [path for path in chosen if "statistic" in made and not bool(own[path].any())]
    pieces = [_Piece(targets[path], scores.magnitude if path in unseen else scorer, *chosen[path]) for path in chosen]
    masks = _SELECT[group](pieces)
    metadata: dict[str, Any] = {**made, "sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else sparsity}
    if group != "row":
        metadata["group"] = group
    if gamma != 0:
        metadata["gamma"] = gamma
    for name, found in (("left_out", left_out), ("unseen", unseen)):
        if found:
            metadata[name] = found
    words = {piece.target.path: ops.pack_mask(mask) for piece, mask in zip(pieces, masks, strict=True)}
    return PersonaMask(words, {path: targets[path].features[1] for path in chosen}, metadata)


@dataclass(frozen=True)
class _Piece:
    """One matrix to be masked, its scores, and the key it is compared under."""

    target: Target
    score: scores.Score
    key: str
    sparsity: float

    def slices(self) -> list[slice]:
        out, width = self.target.features
        step = max(1, _CHUNK // width)
        return [slice(start, min(start + step, out)) for start in range(0, out, step)]

    def parts(self) -> list[Callable[[], tuple[torch.Tensor, ...]]]:
        return [partial(self.score, self.target, rows) for rows in self.slices()]


def _by_row(pieces: Sequence[_Piece]) -> Iterator[torch.Tensor]:
    for piece in pieces:
        keep = _kept(piece.sparsity, piece.target.features[1])
        yield torch.cat([best_of_rows(make(), keep) for make in piece.parts()])


def _by_layer(pieces: Sequence[_Piece]) -> Iterator[torch.Tensor]:
    for piece in pieces:
        out, width = piece.target.features
        yield torch.cat(best_of_all(piece.parts(), _kept(piece.sparsity, out * width)))


def _globally(pieces: Sequence[_Piece]) -> Iterator[torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(piece.key for piece in pieces):
        together = [piece for piece in pieces if piece.key == key]
        count = sum(piece.target.features[0] * piece.target.features[1] for piece in together)
        parts = [make for piece in together for make in piece.parts()]
        masks = iter(best_of_all(parts, _kept(together[0].sparsity, count)))
        for piece in together:
            found[piece.target.path] = torch.cat([next(masks) for _ in piece.slices()])
    return (found[piece.target.path] for piece in pieces)


_SELECT = {"row": _by_row, "layer": _by_layer, "global": _globally}


def _kept(sparsity: float, count: int) -> int:
    return round((1 - sparsity) * count)


def _checked(model: nn.Module, targets: Targets, statistics: Statistics, statistic: str) -> dict[str, torch.Tensor]:
    """Path -> A, in the order of the model's linears; raises, naming the linear, unless they are of this model."""
    if isinstance(statistics, CalibrationStatistics):
        if statistics.shape != targets.parts.shape:
            raise PersonafastError(f"statistics: {different_model(statistics.shape, targets.parts.shape)}")
        statistics = statistics.of(statistic)
    for path, values in statistics.items():
        if path not in targets:
            raise refuse_unknown(model, path, f"statistics[{path!r}]")
        width = targets[path].features[1]
        if values.shape != (width,):
            raise PersonafastError(f"statistics[{path!r}]: {values.numel()} channels for a linear of {width} inputs")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise PersonafastError(f"statistics[{path!r}]: NaN, infinite or negative; calibrate again")
    if not statistics:
        raise PersonafastError("statistics: empty; calibrate on this model")
    return {path: statistics[path] for path in targets if path in statistics}


def _sides(positive: Statistics, negative: Statistics) -> tuple[CalibrationStatistics, CalibrationStatistics]:
    if not isinstance(positive, CalibrationStatistics) or not isinstance(negative, CalibrationStatistics):
        raise PersonafastError("statistics: contrastive scores need what `calibrate` gives, for both sides")
    if positive.shape != negative.shape or set(positive) != set(negative):
        raise PersonafastError("against: statistics of another model; calibrate both sides on one model")
    if positive.samples != negative.samples:
        raise PersonafastError(
            f"against: {negative.samples} texts against {positive.samples}; give both sides equally many"
        )
    check_settings(positive.settings, negative.settings, "against")
    return positive, negative


def _differences(positive: CalibrationStatistics, negative: CalibrationStatistics, of: str) -> dict[str, torch.Tensor]:
    return {
        path: scores.standard_difference(sums.moments(of), negative.sums[path].moments(of))
        for path, sums in positive.sums.items()
    }
