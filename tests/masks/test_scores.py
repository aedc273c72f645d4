"""Masks are, bit for bit, those of the formulas written down in plain torch."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.masks import build_mask, build_opposing_masks, calibrate, mix_masks
from personafast.models.anatomy import anatomy, is_conv1d
from personafast.models.reading import TokenizedText

POSITIVE = [TokenizedText([3, 4, 5, 6, 7], 2), TokenizedText([8, 9, 10], 3), TokenizedText([11, 12, 13, 14], 1)]
NEGATIVE = [TokenizedText([40, 41, 42], 3), TokenizedText([50, 9, 51], 2), TokenizedText([52, 53, 54, 55, 56], 4)]
STATISTICS = ("mean_abs", "l2", "sample_l2")
# The first row of one random mask, from the Philox reference.
FROZEN = "01101011001111111100000101100000"


def weights(net):
    return {
        path: (linear.weight.t() if is_conv1d(linear) else linear.weight).detach().abs().double()
        for path, linear in anatomy(net).linears.items()
    }


def top_rows(score, keep):
    order = score.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def lexicographic(primary, secondary, keep):
    """Rows ordered by primary, then secondary, then index: two stable sorts, the lesser key first."""
    order = secondary.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, primary.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return torch.zeros_like(primary, dtype=torch.bool).scatter_(1, order[:, :keep], True)


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def family(request):
    return tiny.model(request.param)


@pytest.fixture
def sides(family):
    return calibrate(family, POSITIVE), calibrate(family, NEGATIVE)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_wanda(family, sides, statistic, sparsity):
    mask = build_mask(family, sides[0], sparsity=sparsity, statistic=statistic)
    for path, weight in weights(family).items():
        score = weight * sides[0].of(statistic)[path]
        assert torch.equal(mask.dense(path), top_rows(score, round((1 - sparsity) * score.shape[1])))


def test_rounded_weights_tie_often(family, sides):
    with torch.no_grad():
        for linear in anatomy(family).linears.values():
            linear.weight.copy_((linear.weight * 2).round())
    mask = build_mask(family, {path: torch.ones_like(a) for path, a in sides[0].items()})
    for path, weight in weights(family).items():
        assert torch.equal(mask.dense(path), top_rows(weight, weight.shape[1] // 2))


@pytest.mark.parametrize("of", ["x", "sample_l2"])
def test_contrastive_wanda(family, sides, of):
    masks = build_opposing_masks(family, *sides, sparsity=0.4, z_of=of)
    for sign, own, mask in ((1, sides[0], masks[0]), (-1, sides[1], masks[1])):
        for path, weight in weights(family).items():
            (mean, var), (other_mean, other_var) = (side.sums[path].moments(of) for side in sides)
            z = (mean - other_mean) / ((var + other_var).sqrt() + 1e-6)
            expected = lexicographic(weight * torch.relu(sign * z), weight * own[path], round(0.6 * weight.shape[1]))
            assert torch.equal(mask.dense(path), expected)


def test_contrastive_sparse(family, sides):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # weights of 0 are wanted alike by both sides
        for linear in anatomy(family).linears.values():
            linear.weight.mul_(torch.rand(linear.weight.shape, generator=generator) > 0.25)
    for sparsity in (0.2, 0.5, 0.8):
        masks = build_opposing_masks(family, *sides, score="contrastive_sparse", sparsity=sparsity)
        shared = either = 0
        for path, weight in weights(family).items():
            scores = [weight * side[path] for side in sides]
            mine, theirs = (score / score.sum(1, keepdim=True) for score in scores)
            keep = round((1 - sparsity) * weight.shape[1])
            rank = (mine > theirs).double() - (mine < theirs).double()
            first, second = (mask.dense(path) for mask in masks)
            assert torch.equal(first, lexicographic(rank, mine, keep))
            assert torch.equal(second, lexicographic(-rank, theirs, keep))
            # A weight that the other wants more is kept only where all that this side wants more is kept already.
            wanting = (first & (rank < 0)).any(1)
            assert (first | (rank <= 0))[wanting].all()
            shared, either = shared + int((first & second).sum()), either + int((first | second).sum())
        assert masks[0].metadata["overlap"] == masks[1].metadata["overlap"] == pytest.approx(shared / either, abs=1e-6)
    # At 80 % dropped, almost every row finds enough of its own.
    assert shared / either < 0.01


def test_magnitude_and_random(family, sides):
    plain = build_mask(family, sides[0], score="magnitude")
    drawn, again, other = (
        build_mask(family, side, score="random", seed=s) for side, s in ((sides[0], 3), (sides[1], 3), (sides[0], 4))
    )
    for path, weight in weights(family).items():
        assert torch.equal(plain.dense(path), top_rows(weight, weight.shape[1] // 2))
        assert (drawn.dense(path).sum(1) == weight.shape[1] // 2).all()
    assert drawn.overlap(again) == 1.0
    # Two independent halves share a third of what either keeps.
    assert drawn.overlap(other) == pytest.approx(1 / 3, abs=0.03)
    assert drawn.overlap(plain) == pytest.approx(1 / 3, abs=0.03)
    assert drawn.metadata == {"method": "random", "seed": 3, "sparsity": 0.5}


def test_random_bits_are_the_same_on_every_machine():
    net = tiny.model()
    mask = build_mask(net, calibrate(net, POSITIVE), score="random", seed=1)
    bits = mask.dense("model.layers.0.self_attn.q_proj")[0].int().tolist()
    assert "".join(map(str, bits)) == FROZEN


@pytest.mark.parametrize("group", ["layer", "global"])
@pytest.mark.parametrize("chunk", [64, 1 << 22])
def test_groups(family, sides, group, chunk, monkeypatch):
    monkeypatch.setattr("personafast.masks.build._CHUNK", chunk)
    sparsity = {"attention": 0.3, "mlp": 0.6}
    mask = build_mask(family, sides[0], sparsity=sparsity, group=group)
    scores = {path: weight * sides[0][path] for path, weight in weights(family).items()}
    groups = {}
    for path in scores:
        kind = "attention" if "attn" in path or "attention" in path else "mlp"
        groups.setdefault((kind, path if group == "layer" else ""), []).append(path)
    for (kind, _), paths in groups.items():
        flat = torch.cat([scores[path].flatten() for path in paths])[None]
        expected = top_rows(flat, round((1 - sparsity[kind]) * flat.numel()))[0]
        assert torch.equal(torch.cat([mask.dense(path).flatten() for path in paths]), expected)
    assert mask.metadata["group"] == group and mask.metadata["sparsity"] == sparsity


def test_rows_come_out_the_same_in_pieces(family, sides, monkeypatch):
    whole = build_mask(family, sides[0], score="contrastive_sparse", against=sides[1])
    monkeypatch.setattr("personafast.masks.build._CHUNK", 64)
    parts = build_mask(family, sides[0], score="contrastive_sparse", against=sides[1])
    assert all(torch.equal(whole.words[path], parts.words[path]) for path in whole.words)


def test_a_mixture_is_a_weighted_union_of_normalised_scores(family, sides):
    named = dict(zip(("introvert", "thinker"), sides, strict=True))
    mask = mix_masks(family, named, {"introvert": 0.7, "thinker": 0.3}, sparsity=0.5)
    for path, weight in weights(family).items():
        parts = [weight * side[path] for side in sides]
        total = sum(w * part / part.sum(1, keepdim=True) for w, part in zip((0.7, 0.3), parts, strict=True))
        assert torch.equal(mask.dense(path), top_rows(total, weight.shape[1] // 2))
    alone = mix_masks(family, named, {"introvert": 2.0})
    assert alone.overlap(build_mask(family, sides[0])) == 1.0


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_the_authors_scoring(family, sparsity):
    """One text at a time, all of its tokens: the mean of the norms, |W| times it, the best of every row, in float32."""
    norms = {path: [] for path in anatomy(family).linears}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, path=path: norms[path].append(args[0].flatten(0, -2).norm(dim=0))
        )
        for path, linear in anatomy(family).linears.items()
    ]
    with torch.no_grad():
        for text in POSITIVE:
            family(torch.tensor([text.ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    ours = build_mask(
        family, calibrate(family, POSITIVE, tokens="all", batch_size=1), statistic="sample_l2", sparsity=sparsity
    )
    for path, weight in weights(family).items():
        score = weight.float() * torch.stack(norms[path]).mean(0)
        best = score.topk(int(score.shape[1] * (1 - sparsity)), dim=1).indices
        assert torch.equal(ours.dense(path), torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True))


def test_sparsity_by_class_and_path(family, sides):
    paths = list(anatomy(family).linears)
    first = next(path for path in paths if "mlp" in path)
    mask = build_mask(family, sides[0], sparsity={first: 0.75, "mlp": 0.5})
    assert set(mask.words) == {path for path in paths if "mlp" in path}
    for path in mask.words:
        assert mask.kept_of(path) / mask.size_of(path) == (0.25 if path == first else 0.5)
    everywhere = build_mask(family, sides[0], sparsity={"*": 0.5})
    assert set(everywhere.words) == set(paths)


def test_metadata_says_how_it_was_made(family, sides):
    assert build_mask(family, sides[0], sparsity=0.4).metadata == {
        "method": "wanda",
        "statistic": "mean_abs",
        "sparsity": 0.4,
    }
    soft = build_mask(family, sides[0], gamma=0.25, group="layer")
    assert soft.gamma == 0.25 and soft.metadata["group"] == "layer"


def test_bad_input_is_named(family, sides):
    net, (own, other) = family, sides
    path = next(iter(own))
    head = next(name for name, module in net.named_modules() if module is net.get_output_embeddings())
    embedding = next(name for name, module in net.named_modules() if module is net.get_input_embeddings())
    for options, match in (
        ({"sparsity": 1.0}, r"sparsity: 1.0 is not in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity: -0.1"),
        ({"sparsity": float("nan")}, "sparsity: nan"),
        ({"sparsity": {"mlp": 1.5}}, r"sparsity\['mlp'\]: 1.5"),
        ({"sparsity": {"mpl": 0.5}}, "sparsity: 'mpl' covers no linear"),
        ({"sparsity": {head: 0.5}}, "is the head or an embedding, which is never masked"),
        ({"sparsity": {embedding: 0.5}}, "is the head or an embedding, which is never masked"),
        ({"score": "best"}, "score: 'best' is unknown"),
        ({"statistic": "max"}, "statistic: 'max' is unknown"),
        ({"group": "column"}, "group: 'column' is unknown"),
        ({"gamma": 1.5}, r"gamma: 1.5 is not in \[0, 1\]"),
        ({"score": "random", "seed": -1}, "seed: -1"),
        ({"score": "contrastive_wanda"}, "against: contrastive_wanda needs the statistics of the opposing"),
        ({"score": "contrastive_wanda", "against": other, "z_of": "y"}, "z_of: 'y'"),
        ({"score": "contrastive_wanda", "against": calibrate(net, NEGATIVE[:2])}, "against: 2 texts against 3"),
        (
            {"score": "contrastive_wanda", "against": calibrate(net, NEGATIVE, tokens="all")},
            "against: made with other settings",
        ),
    ):
        with pytest.raises(pf.PersonafastError, match=match):
            build_mask(net, own, **options)
    with pytest.raises(pf.PersonafastError, match="against: 2 texts against 3"):
        build_opposing_masks(net, own, calibrate(net, NEGATIVE[:2]), score="wanda")
    for values, match in (
        ({head: torch.ones(tiny.HIDDEN)}, "is the head or an embedding, which is never masked"),
        ({path: torch.full_like(own[path], torch.nan)}, "NaN, infinite or negative"),
        ({path: -own[path]}, "NaN, infinite or negative"),
        ({path: own[path][:-1]}, f"{own[path].numel() - 1} channels for a linear of"),
        ({}, "statistics: empty"),
    ):
        with pytest.raises(pf.PersonafastError, match=match):
            build_mask(net, values)
    named = {"a": own, "b": other}
    for mixed, match in (({}, "weights: empty"), ({"c": 1.0}, "no such statistics"), ({"a": 0.0}, "not a positive")):
        with pytest.raises(pf.PersonafastError, match=match):
            mix_masks(net, named, mixed)
