import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.masks import PersonaMask, build_mask, calibrate, differences, shares
from personafast.models.anatomy import anatomy
from personafast.models.reading import TokenizedText

TEXTS = [TokenizedText([3, 4, 5, 6, 7], 2), TokenizedText([8, 9, 10], 3), TokenizedText([11, 12, 13, 14, 15, 16], 1)]


def test_statistics_are_means_over_response_tokens_without_padding():
    net = tiny.model()
    found = calibrate(net, TEXTS, batch_size=3)
    path = "model.layers.1.mlp.down_proj"
    seen = []
    hook = anatomy(net).linears[path].register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for text in TEXTS:
            net(torch.tensor([text.ids]), use_cache=False)
    hook.remove()
    tokens = torch.cat([x[-text.response :] for x, text in zip(seen, TEXTS, strict=True)])
    torch.testing.assert_close(found[path], tokens.abs().double().mean(0), atol=1e-6, rtol=1e-5)
    assert set(found) == set(anatomy(net).linears)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_every_row_keeps_its_best_scores(sparsity):
    net = tiny.model()
    statistics = calibrate(net, TEXTS)
    mask = build_mask(net, statistics, sparsity=sparsity)
    for path, linear in anatomy(net).linears.items():
        dense, score = mask.dense(path), linear.weight.detach().abs().double() * statistics[path]
        keep = round((1 - sparsity) * score.shape[1])
        assert (dense.sum(1) == keep).all()
        for kept, row in zip(dense, score, strict=True):
            assert row[kept].min() >= (row[~kept].max() if (~kept).any() else 0)
    assert mask.kept == pytest.approx(1 - sparsity, abs=0.03)


def test_ties_go_to_the_smaller_index():
    net = tiny.model()
    with torch.no_grad():
        for linear in anatomy(net).linears.values():
            linear.weight.fill_(1.0)
    statistics = {path: torch.ones(linear.weight.shape[1]) for path, linear in anatomy(net).linears.items()}
    mask = build_mask(net, statistics, sparsity=0.5)
    dense = mask.dense("model.layers.0.self_attn.q_proj")
    assert dense[:, :16].all() and not dense[:, 16:].any()


def test_union():
    a, b = torch.rand(4, 40) > 0.5, torch.rand(4, 40) > 0.5
    one, two = (PersonaMask({"x": pf.ops.pack_mask(m)}, {"x": 40}) for m in (a, b))
    assert torch.equal(one.union(two).dense("x"), a | b)
    assert torch.equal(one.dense("x"), a)
    with pytest.raises(pf.PersonafastError, match="same linears"):
        one.union(PersonaMask({"y": one.words["x"]}, {"y": 40}))


def test_bad_input_is_named():
    net = tiny.model()
    statistics = calibrate(net, TEXTS)
    with pytest.raises(pf.PersonafastError, match="sparsity"):
        build_mask(net, statistics, sparsity=1.0)
    with pytest.raises(pf.PersonafastError, match="no such linear"):
        build_mask(net, {"x": torch.ones(3)})
    with pytest.raises(pf.PersonafastError, match="31 channels"):
        build_mask(net, {"model.layers.0.self_attn.q_proj": torch.ones(31)})
    with pytest.raises(pf.PersonafastError, match="texts: empty"):
        calibrate(net, [])
    with pytest.raises(pf.PersonafastError, match=r"int32 \[out, 2\]"):
        PersonaMask({"x": torch.zeros(4, 3, dtype=torch.int32)}, {"x": 40})


def pair():
    a, b = (torch.rand(4, 40, generator=torch.Generator().manual_seed(seed)) > 0.5 for seed in (0, 1))
    return a, b, *(PersonaMask({"x.3.attn.q": pf.ops.pack_mask(m)}, {"x.3.attn.q": 40}) for m in (a, b))


def test_set_operations_and_their_reports():
    a, b, one, two = pair()
    path = "x.3.attn.q"
    assert torch.equal(one.intersection(two).dense(path), a & b)
    assert torch.equal(one.difference(two).dense(path), a & ~b)
    assert torch.equal(one.union(two, one.difference(two)).dense(path), a | b)
    assert one.overlap(two) == int((a & b).sum()) / int((a | b).sum()) and one.overlap(one) == 1.0
    assert one.kept == int(a.sum()) / 160 and one.difference(one).kept == 0
    assert one.difference(one).overlap(two.difference(two)) == 1.0
    (row,) = differences(one, two)
    assert (row.path, row.block, row.name, row.kind) == (path, 3, "attn.q", "attention")
    assert (row.weights, row.first, row.second, row.both) == (160, int(a.sum()), int(b.sum()), int((a & b).sum()))
    assert row.share == int((a ^ b).sum()) / 160 and row.jaccard == one.overlap(two)
    (own,) = shares(one)
    assert (own.weights, own.kept, own.share, own.nbytes) == (160, int(a.sum()), one.kept, 4 * 2 * 4)
    for join in (one.intersection, one.difference, one.overlap):
        with pytest.raises(pf.PersonafastError, match="same linears"):
            join(PersonaMask({path: one.words[path]}, {path: 41}))


def test_bits_beyond_the_width_do_not_count():
    a, _, one, _ = pair()
    path = "x.3.attn.q"
    noisy = one.words[path].clone()
    noisy[:, -1] |= -256  # bits 8 to 31 lie beyond 40 inputs
    assert PersonaMask({path: noisy}, {path: 40}).kept_of(path) == int(a.sum())


def test_a_soft_gate_is_stored_with_the_mask(tmp_path):
    net = tiny.model()
    library = pf.PersonaLibrary(anatomy(net).shape)
    soft = build_mask(net, calibrate(net, TEXTS), sparsity=0.3, gamma=0.2)
    library.add_mask("soft", soft)
    library.save_pretrained(tmp_path / "library")
    again = pf.PersonaLibrary.from_pretrained(tmp_path / "library").masks["soft"]
    path = "model.layers.0.mlp.up_proj"
    mask = soft.dense(path).float()
    assert again.gamma == 0.2
    torch.testing.assert_close(again.gate(path), mask + 0.2 * (1 - mask))
    assert soft.with_metadata(gamma=0).gamma == 0 and soft.gamma == 0.2
    for gamma in (1.5, -0.1, float("nan"), "much", True):
        with pytest.raises(pf.PersonafastError, match="gamma"):
            soft.with_metadata(gamma=gamma)
