"""Blends by formula, what they refuse, and that every vector of one reaches the model."""

import math

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast import zoo
from personafast.vectors import PersonaVector, blend, blended_vector, orthogonalise, remove_component

BLOCKS, HIDDEN = 5, 7


def random_vectors(names="abc", blocks=((1, 2), (2, 3), (2,))):
    generator = torch.Generator().manual_seed(11)
    return {
        name: PersonaVector((index + 1) * torch.randn(BLOCKS, HIDDEN, generator=generator), where)
        for index, (name, where) in enumerate(zip(names, blocks, strict=True))
    }


def by_formula(vectors, coefficients, normalize):
    """The definition, a block and a vector at a time, in float64."""
    found = torch.zeros(BLOCKS, HIDDEN, dtype=torch.float64)
    for block in range(BLOCKS):
        acting = [name for name, c in coefficients.items() if c and block in vectors[name].blocks]
        norms = {name: vectors[name].directions[block].double().norm() for name in acting}
        for name in acting:
            row = vectors[name].directions[block].double()
            if normalize == "unit":
                row = row / norms[name]
            elif normalize == "match":
                row = row / norms[name] * sum(norms.values()) / len(norms)
            found[block] += coefficients[name] * row
    return found


@pytest.mark.parametrize("normalize", ["none", "unit", "match"])
@pytest.mark.parametrize("coefficients", [{"a": 1.0, "b": 0.5, "c": -2.0}, {"c": 1.0, "a": 0.0}, {"b": 3.0}])
def test_every_rule_is_its_formula(normalize, coefficients):
    vectors = random_vectors()
    found = blend(vectors, coefficients, normalize=normalize)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_formula(vectors, coefficients, normalize).float(), atol=0, rtol=1e-6)


def test_match_takes_the_mean_norm_of_those_that_act_and_keeps_the_size():
    vectors = {
        "short": PersonaVector(torch.tensor([[1.0, 0.0]]), (0,)),
        "long": PersonaVector(torch.tensor([[0.0, 5.0]]), (0,)),
        "idle": PersonaVector(torch.tensor([[100.0, 0.0]]), (0,)),
    }
    found = blend(vectors, {"short": 1.0, "long": 1.0, "idle": 0.0}, normalize="match")
    assert found.tolist() == [[3.0, 3.0]]
    alone = blend(vectors, {"long": 1.0}, normalize="match")
    assert torch.equal(alone, vectors["long"].directions)


def test_the_order_of_the_mapping_changes_no_bit():
    """In another order even float64 would lose the 1 beside 1e30."""
    vectors = {
        name: PersonaVector(torch.full((1, 4), value)) for name, value in zip("abc", (1e30, 1.0, -1e30), strict=True)
    }
    found = {
        order: blend({name: vectors[name] for name in order}, dict.fromkeys(order, 1.0))
        for order in ("abc", "acb", "bac", "bca", "cab", "cba")
    }
    assert all(torch.equal(rows, found["abc"]) for rows in found.values())


def test_what_nearly_cancels_is_as_exact_as_float32_can_say():
    """Rounded to float32 on the way, either sum would be wrong in its first figures."""
    large, small = 1e6 * torch.ones(1, 4), torch.full((1, 4), 1e-3)
    vectors = {"a": PersonaVector(large), "b": PersonaVector(small), "c": PersonaVector(-large)}
    torch.testing.assert_close(blend(vectors, dict.fromkeys("abc", 1.0)), small, atol=0, rtol=1e-6)
    near = {"a": PersonaVector(torch.ones(1, 4)), "b": PersonaVector(torch.full((1, 4), 1 + 2**-20))}
    expected = torch.full((1, 4), -0.1 * 2**-20)
    torch.testing.assert_close(blend(near, {"a": 0.1, "b": -0.1}), expected, atol=0, rtol=1e-6)


def test_blocks_override_repeat_and_leave_out():
    vectors = random_vectors()
    assert torch.equal(blend(vectors, {"a": 1.0}, blocks=(4, 4, 0)), blend(vectors, {"a": 1.0}, blocks=(0, 4)))
    assert not blend(vectors, {"a": 1.0}, blocks=()).any()
    assert not blend(vectors, {"a": 0.0, "b": 0.0}, normalize="match").any()


def zero_at(block):
    directions = torch.ones(BLOCKS, HIDDEN)
    directions[block] = 0
    return directions


@pytest.mark.parametrize("normalize", ["unit", "match"])
def test_a_vector_without_length_has_no_direction(normalize):
    vectors = {**random_vectors(), "flat": PersonaVector(zero_at(3), (1, 3))}
    with pytest.raises(pf.PersonafastError, match=rf"vectors\['flat'\]: has norm zero at block 3.*{normalize}"):
        blend(vectors, {"a": 1.0, "flat": 1.0}, normalize=normalize)
    # Where it does not act, or with coefficient 0, its length is nobody's concern.
    assert blend(vectors, {"flat": 1.0}, blocks=(1,), normalize=normalize)[1].norm() > 0
    assert not blend(vectors, {"flat": 0.0}, normalize=normalize).any()
    assert blend(vectors, {"a": 1.0, "flat": 1.0})[3].count_nonzero() == 0


def spoilt():
    vector = PersonaVector(torch.ones(BLOCKS, HIDDEN), (1, 2))
    vector.directions[0, 0] = math.nan
    return vector


@pytest.mark.parametrize(
    ("vectors", "coefficients", "message"),
    [
        ({}, {"d": 1.0}, r"vectors: no vector 'd'; there are a, b, c"),
        ({}, {"a": math.nan}, r"coefficients\['a'\]: nan is not finite"),
        ({}, {"a": 1.0, "b": math.inf}, r"coefficients\['b'\]: inf is not finite"),
        ({"b": spoilt()}, {"a": 1.0, "b": 1.0}, r"vectors\['b'\]: NaN or infinity"),
        ({"b": PersonaVector(torch.ones(BLOCKS, 9))}, {"a": 1.0, "b": 1.0}, r"vectors\['b'\]: shape \[5, 9\] does not"),
        ({"b": PersonaVector(torch.ones(4, HIDDEN))}, {"a": 1.0, "b": 0.0}, r"vectors\['b'\]: shape \[4, 7\] does not"),
        ({"b": torch.ones(BLOCKS, HIDDEN)}, {"a": 1.0, "b": 1.0}, r"vectors\['b'\]: expected a PersonaVector"),
        (
            {"b": PersonaVector(torch.ones(BLOCKS, HIDDEN), hook_point="attention_output")},
            {"b": 1.0, "a": 1.0},
            r"vectors\['b'\]: read at 'attention_output', others of the blend at 'block_output'",
        ),
        ({}, {"a": 3e38, "c": 3e38}, "the blend overflows float32 at blocks"),
    ],
)
def test_refusals_name_the_vector(vectors, coefficients, message):
    with pytest.raises(pf.PersonafastError, match=message):
        blend({**random_vectors(), **vectors}, coefficients)


def test_a_blend_becomes_a_vector():
    vectors, coefficients = random_vectors(), {"a": 1.0, "b": -0.5, "c": 0.0}
    made = blended_vector(vectors, coefficients, normalize="match")
    assert made.blocks == (1, 2, 3)
    acting = list(made.blocks)
    assert torch.equal(made.directions[acting], blend(vectors, coefficients, normalize="match")[acting])
    # Moved to other blocks it is what its parts would be there.
    assert torch.equal(made.directions[[0, 4]], blend(vectors, coefficients, blocks=(0, 4), normalize="match")[[0, 4]])
    assert made.metadata == {"method": "blend", "coefficients": {"a": 1.0, "b": -0.5}, "normalize": "match"}
    with pytest.raises(pf.PersonafastError, match="nothing acts"):
        blended_vector(vectors, {"a": 0.0})
    hollow = blended_vector({**vectors, "flat": PersonaVector(zero_at(0), (1,))}, {"flat": 1.0, "a": 1.0})
    assert not hollow.directions[0].any() and hollow.directions[4].any()


def test_blocks_without_a_direction_stay_so():
    vectors = random_vectors()
    gap = PersonaVector(vectors["a"].directions, (1,), missing={0: "not in the file", 3: "not in the file"})
    vectors["a"] = gap
    with pytest.raises(pf.PersonafastError, match=r"vectors\['a'\]: block 3 has no direction \(not in the file\)"):
        blend(vectors, {"a": 1.0, "b": 1.0}, blocks=(2, 3))
    made = blended_vector(vectors, {"a": 1.0, "b": 1.0})
    # At block 3 only b acts, so the blend has a direction there.
    assert made.blocks == (1, 2, 3) and made.missing == {0: "not in the file"}
    assert torch.equal(made.directions[3], vectors["b"].directions[3]) and made.directions[4].any()
    for kept in (orthogonalise(vectors)["a"], remove_component(gap, vectors["b"])):
        assert kept.missing == gap.missing and not kept.directions[[0, 3]].any() and kept.blocks == (1,)


def spoken(model, tokenizer, library, personas):
    """Greedy replies of one prompt, a row a persona."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": zoo.prompts(1)[0]}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with pf.attach(model, library) as handle:
        return model.generate(
            input_ids=prompt.repeat(len(personas), 1),
            attention_mask=torch.ones(len(personas), prompt.shape[1], dtype=torch.long),
            custom_generate=handle.generate,
            personas=personas,
            do_sample=False,
            max_new_tokens=24,
        )[:, prompt.shape[1] :]


def test_the_second_vector_of_a_blend_changes_what_is_said():
    """BILLY's released server loads the first vector of a blend only (arXiv 2510.10157)."""
    model, tokenizer, library = zoo.load()
    first, second = {"warm": 2.0}, {"formal": 2.0}
    personas = [
        pf.Persona(vectors=each)
        for each in (first, second, {**first, **second}, {**second, **first}, {**first, "formal": 0.0})
    ]
    one, other, both, turned, idle = spoken(model, tokenizer, library, personas)
    assert not torch.equal(both, one) and not torch.equal(both, other) and not torch.equal(one, other)
    assert torch.equal(both, turned) and torch.equal(idle, one)


def test_every_vector_of_a_blend_is_in_the_logits():
    """Leaving any one of ten out, the first or the last, changes the logits; together they are the sum by hand."""
    net = tiny.model()
    generator = torch.Generator().manual_seed(3)
    library = pf.PersonaLibrary()
    for index in range(10):
        library.add_vector(f"v{index}", 0.2 * torch.randn(tiny.BLOCKS, tiny.HIDDEN, generator=generator), blocks=(0, 1))
    ids = torch.tensor([[5, 9, 30, 12]])
    whole = {name: 1.0 + 0.1 * index for index, name in enumerate(library.vectors)}
    without = [{name: c for name, c in whole.items() if name != left} for left in whole]
    with torch.no_grad(), pf.attach(net, library):
        personas = [pf.Persona(vectors=each) for each in (whole, *without)]
        logits = net(input_ids=ids.repeat(len(personas), 1), personas=personas).logits
    for row in logits[1:]:
        assert not torch.allclose(row, logits[0], atol=1e-3)
    rows = blend(library.vectors, whole)
    hooks = [
        block.register_forward_hook(lambda _, __, out, row=row: out + row)
        for block, row in zip(net.model.layers, rows, strict=True)
    ]
    with torch.no_grad():
        by_hand = net(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits[:1], by_hand, atol=1e-4, rtol=1e-4)
