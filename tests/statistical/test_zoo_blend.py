"""The main job on the built-in model: four traits at once, through the public API."""

import pytest
import torch

import personafast as pf
from personafast import ops, zoo
from personafast.evaluate.demo import measure
from personafast.zoo.grammar import is_grammatical
from personafast.zoo.traits import TRAITS


@pytest.fixture(scope="module")
def parts():
    return zoo.load()


@pytest.fixture(scope="module")
def result(parts):
    found = measure(
        *parts,
        chosen=zoo.DEMO_TRAITS,
        traits=TRAITS,
        questions=zoo.prompts(400, 11),
        is_grammatical=is_grammatical,
        seed=11,
    )
    return {method["name"]: method for method in found["methods"]}, found["settings"]


def test_direct_shows_all_four_traits_in_grammatical_replies(result):
    methods, _ = result
    assert methods["direct"]["joint"]["rate"] >= 0.75
    assert methods["direct"]["grammar"] >= 0.95


def test_direct_is_fifteen_points_above_the_merge_at_the_lower_end(result):
    _, settings = result
    assert settings["direct_minus_merge"]["low"] >= 0.15


def test_mixtures_do_not_blend(result):
    methods, _ = result
    assert methods["linear"]["joint"]["high"] < 0.15
    assert methods["scr"]["joint"]["high"] < 0.05
    # It is not that they show nothing: every trait has its share of the replies.
    for name in ("linear", "scr"):
        assert all(trait["rate"] > 0.1 for trait in methods[name]["traits"].values())


@pytest.mark.parametrize("name", zoo.DEMO_TRAITS)
def test_greedy_direct_with_one_policy_is_that_policy(parts, name):
    """Against PEFT on the committed adapter, and at weight 0 against the reference."""
    peft = pytest.importorskip("peft")
    model, tokenizer, library = parts
    chats = [[{"role": "user", "content": text}] for text in zoo.prompts(8, 3)]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True, padding_side="left"
    )
    options = {**batch, "max_new_tokens": 48, "do_sample": False}
    plain = model.generate(**options)
    with ops.use_backend("reference"), pf.attach(model, library) as handle:
        found = {
            weight: model.generate(
                **options, custom_generate=handle.generate, personas=pf.Persona(policies={name: weight}), min_p=0.0
            )
            for weight in (1.0, 0.0)
        }
    wrapped = peft.PeftModel.from_pretrained(zoo.load()[0], zoo.path() / "library" / "policies" / name)
    assert torch.equal(found[1.0], wrapped.generate(**options))
    assert torch.equal(found[0.0], plain)
    assert not torch.equal(found[1.0], plain)
