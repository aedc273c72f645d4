"""The main job on the built-in model: four traits at once, through the public API."""

import copy

import pytest
import torch

import personafast as pf
from personafast import ops, zoo
from personafast.evaluate.chat import encode
from personafast.evaluate.demo import measure
from personafast.evaluate.intervals import newcombe_difference
from personafast.models.anatomy import anatomy
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


def replies(parts, sampler, kind, count=400, seed=11, **options):
    """How many replies of a sampler show all four traits, at the settings of the demo."""
    model, tokenizer, library = parts
    personas = pf.Persona(policies=dict.fromkeys(zoo.DEMO_TRAITS, 1.0))
    given = {"library": library} if kind == "lora" else {"policies": separate(model, library)}
    batch = encode(tokenizer, zoo.prompts(count, 11))
    with pf.attach(model, tokenizer=tokenizer, **given) as handle:
        out = model.generate(
            **batch,
            custom_generate=handle.generate,
            personas=personas,
            sampler=sampler,
            seed=seed,
            do_sample=True,
            top_k=0,
            min_p=0.05,
            max_new_tokens=64,
            **options,
        )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(all(TRAITS[name].detect(text.strip()) for name in zoo.DEMO_TRAITS) for text in texts)


def separate(model, library):
    """The policies as models of their own, each adapter added to a copy of the weights."""
    models = {}
    for name in zoo.DEMO_TRAITS:
        models[name] = copy.deepcopy(model)
        linears = anatomy(models[name]).linears
        with torch.no_grad():
            for path, factors in library.policies[name].factors.items():
                linears[path].weight += factors.scale * factors.b.float() @ factors.a.float()
    return pf.PolicySet.from_models(model, models)


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("verify", "separate"),
        ("block", "separate"),
        ("block", "lora"),
        pytest.param("verify", "lora", marks=pytest.mark.slow),
    ],
)
def test_verified_drafts_blend_as_direct_does_and_beat_the_merge(parts, result, sampler, kind):
    methods, _ = result
    n = 400
    direct, merge = (round(n * methods[name]["joint"]["rate"]) for name in ("direct", "merge"))
    found = replies(parts, sampler, kind, n)
    against_direct = newcombe_difference(found, n, direct, n)
    assert against_direct.low <= 0 <= against_direct.high
    assert newcombe_difference(found, n, merge, n).low >= 0.15


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
