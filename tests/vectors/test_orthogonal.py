"""Orthogonal vectors: properties of both methods, and refusals by name."""

import pytest
import torch

import personafast as pf
from personafast.vectors import PersonaVector, orthogonal, orthogonalise, remove_component

BLOCKS, HIDDEN = 3, 12


def leaning(seed=0, lean=1.5):
    """Three vectors that lean on a common direction, of norms that differ several-fold."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(BLOCKS, HIDDEN, generator=generator)
    found = {}
    for name, scale in (("a", 1.0), ("b", 4.0), ("c", 0.3)):
        own = torch.randn(BLOCKS, HIDDEN, generator=generator)
        found[name] = PersonaVector(scale * (lean * common + own), (1,), {"from": name})
    return found


def units(vectors):
    stacked = torch.stack([vector.directions.double() for vector in vectors.values()], dim=1)
    return stacked / stacked.norm(dim=-1, keepdim=True)  # [blocks, N, hidden]


def grams(vectors):
    rows = units(vectors)
    return rows @ rows.mT


@pytest.mark.parametrize("method", ["gram_schmidt", "symmetric"])
@pytest.mark.parametrize("keep_norms", [True, False])
def test_they_are_orthogonal_and_span_what_they_spanned(method, keep_norms):
    vectors = leaning()
    assert grams(vectors)[0, 0, 1] > 0.4
    found = orthogonalise(vectors, method=method, keep_norms=keep_norms)
    torch.testing.assert_close(grams(found), torch.eye(3, dtype=torch.float64).expand(3, 3, 3), atol=1e-6, rtol=0)
    before, after = units(vectors), units(found)
    torch.testing.assert_close(before @ after.mT @ after, before, atol=1e-6, rtol=0)
    # Every vector still points the way it pointed, not the opposite one.
    assert ((before * after).sum(-1) > 0.3).all()
    for name, vector in found.items():
        assert vector.blocks == (1,) and vector.metadata["from"] == name
        assert vector.metadata["orthogonalised"]["method"] == method
        if keep_norms:
            torch.testing.assert_close(vector.norms, vectors[name].norms, rtol=1e-6, atol=0)
        else:
            along = (vectors[name].directions * vector.directions).sum(1) / vector.norms
            torch.testing.assert_close(vector.norms, along, rtol=1e-5, atol=0)


def test_gram_schmidt_keeps_the_first_to_the_bit_and_subtracts_from_the_rest():
    vectors = leaning()
    found = orthogonalise(vectors, ["b", "a"], method="gram_schmidt", keep_norms=False)
    assert list(found) == ["b", "a"]
    first, second = vectors["b"].directions, vectors["a"].directions
    assert torch.equal(found["b"].directions, first)
    share = (second * first).sum(1, keepdim=True) / first.square().sum(1, keepdim=True)
    torch.testing.assert_close(found["a"].directions, second - share * first, atol=1e-5, rtol=1e-5)
    assert torch.equal(orthogonalise(vectors, ["b", "a"], method="gram_schmidt")["b"].directions, first)


def test_symmetric_is_the_inverse_square_root_of_the_gram_matrix_and_knows_no_order():
    vectors = leaning()
    found = orthogonalise(vectors, method="symmetric")
    rows = units(vectors)
    values, basis = torch.linalg.eigh(rows @ rows.mT)
    expected = (basis * values.rsqrt()[:, None]) @ basis.mT @ rows
    torch.testing.assert_close(units(found), expected, atol=1e-6, rtol=0)
    turned = orthogonalise(vectors, ["c", "b", "a"], method="symmetric")
    for name in vectors:
        torch.testing.assert_close(turned[name].directions, found[name].directions, atol=1e-5, rtol=1e-5)


def test_symmetric_moves_the_unit_vectors_least():
    vectors = leaning()
    moved = {
        method: (units(orthogonalise(vectors, method=method)) - units(vectors)).square().sum()
        for method in ("symmetric", "gram_schmidt")
    }
    assert moved["symmetric"] < 0.9 * moved["gram_schmidt"]


def test_only_some_blocks_and_zero_rows():
    vectors = leaning()
    flat = vectors["b"].directions.clone()
    flat[0] = 0
    vectors["b"] = PersonaVector(flat, (1,))
    found = orthogonalise(vectors)
    assert not found["b"].directions[0].any()
    pair = orthogonalise({name: vectors[name] for name in "ac"})
    torch.testing.assert_close(found["a"].directions[0], pair["a"].directions[0], atol=1e-6, rtol=1e-6)
    some = orthogonalise(vectors, blocks=(1,))
    assert torch.equal(some["a"].directions[[0, 2]], vectors["a"].directions[[0, 2]])
    assert torch.equal(some["a"].directions[1], found["a"].directions[1])


@pytest.mark.parametrize("method", ["gram_schmidt", "symmetric"])
def test_dependent_vectors_are_refused_by_name_and_block(method):
    vectors = leaning()
    rows = vectors["c"].directions.clone()
    rows[2] = 2 * vectors["a"].directions[2] - vectors["b"].directions[2]
    vectors["c"] = PersonaVector(rows, (1,))
    with pytest.raises(pf.PersonafastError, match=r"vectors\['c'\]: at block 2 it depends on vectors\['a'\], vectors"):
        orthogonalise(vectors, method=method)
    assert orthogonalise(vectors, ["a", "c"], method=method)
    assert orthogonalise(vectors, method=method, blocks=(0, 1))


def test_nearly_parallel_vectors_come_out_orthogonal():
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(1, 64, generator=generator)
    vectors = {
        name: PersonaVector(base + 0.03 * torch.randn(1, 64, generator=generator), (0,))
        for name in ("a", "b", "c", "d")
    }
    for method in ("gram_schmidt", "symmetric"):
        torch.testing.assert_close(
            grams(orthogonalise(vectors, method=method)), torch.eye(4, dtype=torch.float64)[None], atol=1e-6, rtol=0
        )


def test_rounding_does_not_grow_along_a_chain():
    """v_k = e_(k-1) + e_k / 50: what one direction is off by, the next one would multiply by 50, nine times over."""
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
    rows = torch.stack([basis[0], *(basis[index - 1] + basis[index] / 50 for index in range(1, 10))])
    found = orthogonal._orthogonal(rows, ["v"] * 10, 0, "gram_schmidt", keep_norms=False)
    found = found / found.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found @ found.T, torch.eye(10, dtype=torch.float64), atol=1e-12, rtol=0)


def test_removing_takes_the_span_out_and_nothing_else():
    vectors = leaning()
    others = {"a": vectors["a"], "b": vectors["b"]}
    rest = remove_component(vectors["c"], others)
    taken = vectors["c"].directions - rest.directions
    for other in others.values():
        assert ((rest.directions * other.directions).sum(1) / other.norms / rest.norms).abs().max() < 1e-6
    # What was taken lies in the span: least squares finds it there.
    for block in range(BLOCKS):
        basis = torch.stack([other.directions[block] for other in others.values()], dim=1).double()
        solved = torch.linalg.lstsq(basis, taken[block][:, None].double()).solution
        torch.testing.assert_close(basis @ solved, taken[block][:, None].double(), atol=1e-5, rtol=1e-5)
    doubled = remove_component(vectors["c"], {**others, "again": PersonaVector(-2 * vectors["a"].directions)})
    torch.testing.assert_close(doubled.directions, rest.directions, atol=1e-6, rtol=1e-5)
    kept = remove_component(vectors["c"], others, keep_norm=True)
    torch.testing.assert_close(kept.norms, vectors["c"].norms)
    torch.testing.assert_close(kept.directions / kept.norms[:, None], rest.directions / rest.norms[:, None])
    assert kept.blocks == (1,) and kept.metadata["removed"] == {"names": ["a", "b"], "keep_norm": True}
    one = remove_component(vectors["c"], vectors["a"], blocks=(0,))
    assert torch.equal(one.directions[1:], vectors["c"].directions[1:]) and not torch.equal(
        one.directions, rest.directions
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: orthogonalise(v, method="qr"), "method: 'qr' is not one of gram_schmidt, symmetric"),
        (lambda v: orthogonalise(v, ["a", "z"]), "no vector 'z'; there are a, b, c"),
        (lambda v: orthogonalise(v, ["a", "b", "a"]), "names a vector twice"),
        (lambda v: orthogonalise({}), "names: empty"),
        (lambda v: orthogonalise(v, blocks=(3,)), "blocks: 3 is not in 0..2"),
        (lambda v: orthogonalise({**v, "d": PersonaVector(torch.ones(3, 5))}), r"vectors\['d'\]: shape \[3, 5\]"),
        (lambda v: remove_component(v["a"], {}), "others: empty"),
        (lambda v: remove_component(v["a"], {"x": v["a"], "b": v["b"]}), "at block 0 it lies in the span of x, b"),
        (lambda v: remove_component(v["a"], PersonaVector(torch.ones(3, 5))), r"vectors\['others'\]: shape \[3, 5\]"),
        (
            lambda v: remove_component(
                v["a"], PersonaVector(torch.ones(BLOCKS, HIDDEN), hook_point="attention_output")
            ),
            r"vectors\['others'\]: read at 'attention_output'",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(pf.PersonafastError, match=message):
        call(leaning())
