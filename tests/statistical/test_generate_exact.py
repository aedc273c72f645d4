"""Texts that `generate` draws from real models, against targets enumerated from the members' own forward passes.

Everything a user can choose is here once: the kind of the policies, the sampler and its draft, the rule, min-p and the
two temperatures. `helpers/exact.py` computes what is expected.
"""

import functools
import itertools

import pytest
import torch
from helpers import exact
from helpers.table import p_value

import personafast as pf

SAMPLES, FEW = 100_000, 12_500
BATCH = 12_500
pytestmark = pytest.mark.filterwarnings("ignore:A decoder-only")


@functools.cache
def world(kind):
    return exact.world(kind)


@functools.cache
def small_model():
    return exact.model(5, hidden=8)


def root_mean_square(ratios, alpha):
    """A rule of a user's own: log of the root of sum w r^2, less a little of what the first policy favours."""
    share = (alpha / alpha.sum()).view(-1, *[1] * (ratios.dim() - 1))
    return (share * (2 * ratios).exp()).sum(0).log() / 2 - 0.3 * ratios[0].tanh()


def persona(aggregator="geometric", p=1.0, q=1.0, **more):
    return pf.Persona(policies={"p": p, "q": q}, aggregator=aggregator, **more)


GEOMETRIC = persona()
LINEAR = persona("linear", 0.6, 0.4)
PERSONAS = {
    "geometric": GEOMETRIC,
    "negative": persona(p=0.8, q=-0.5),
    "linear": LINEAR,
    "harmonic": persona("harmonic", 0.7, 0.3),
    "power": pf.Persona(policies={"p": 0.7, "q": 0.3}, aggregator="power", p=2.0),
    "jensen_shannon": persona("jensen_shannon", 0.4, 0.6),
    "min": persona("min"),
    "max": persona("max"),
    "function": persona(root_mean_square, 0.5, 0.9),
    "geometric on a base": pf.Persona(policies={"p": 0.8}, base="q"),
    "linear on a base": persona("linear", 0.5, 0.5, base="q"),
    "harmonic on a base": pf.Persona(policies={"p": 1.0}, aggregator="harmonic", base="q"),
}
SETTINGS = ("min_p", "temperature", "policy_temperature", "eos")


def options_of(more):
    """What `generate` takes, from what a case says."""
    options = dict(more)
    if options.get("draft") == "small":
        options["draft"] = small_model()
    bias = options.pop("bias", None)
    if bias is not None:
        options["sequence_bias"] = {bias[:2]: bias[2]}
    return options


def wanted(kind, given, more):
    """What a case's texts should follow."""
    if more.get("sampler") == "mixture" or (more.get("carry") and given.aggregator == "linear"):
        chunk = exact.LENGTH if more.get("carry") else more.get("chunk", 1)
        t = more.get("temperature", 1.0) * more.get("policy_temperature", 1.0)
        return exact.mixture(world(kind), given.policies, chunk, more.get("min_p", 0.0), t)
    known = {name: value for name, value in more.items() if name in (*SETTINGS, "bias")}
    return exact.joint(world(kind), given, **known)


@functools.cache
def sampled(kind, name, more, rows, seed):
    """Codes of texts and the statistics of the last batch; `more` as items, so that it can be a key."""
    with world(kind).attach() as handle:
        return exact.texts(world(kind), handle, PERSONAS[name], rows, BATCH, seed, **options_of(dict(more)))


def check(kind, name, more, rows, seed=1):
    codes, stats = sampled(kind, name, tuple(more.items()), rows, seed)
    assert p_value(codes, wanted(kind, PERSONAS[name], more)) > 1e-3
    return stats


def case(kind, name, sampler, **more):
    drawn = f"{sampler}{'-' + more['draft'] if 'draft' in more else ''}"
    settings = "-".join(f"{key}={value}" for key, value in more.items() if key != "draft")
    return pytest.param(
        kind, name, {"sampler": sampler, **more}, id="-".join(filter(None, [kind, drawn, name, settings]))
    )


CASES = [
    case("lora", "geometric", "block", draft="merge", min_p=0.05),
    case("separate", "geometric", "block", draft="merge", chunk=2, temperature=0.8),
    case("separate", "negative", "verify", draft="reference", min_p=0.05, policy_temperature=0.7),
    case("prompts", "harmonic", "block", draft="reference"),
    case("prompts", "jensen_shannon", "verify", draft="ngram"),
    case("lora", "power", "block", draft="ngram", min_p=0.05),
    case("separate", "power", "block", draft="small"),
    case("lora", "min", "token_rs", temperature=0.8),
    case("prompts", "max", "token_rs", min_p=0.05),
    case("separate", "function", "direct", min_p=0.05, policy_temperature=0.7),
    case("lora", "function", "block", chunk=2),
    case("prompts", "geometric on a base", "block", min_p=0.05),
    case("lora", "geometric on a base", "token_rs", policy_temperature=0.7),
    case("separate", "linear on a base", "verify", min_p=0.05, policy_temperature=0.7),
    case("lora", "linear on a base", "direct", temperature=0.8),
    case("lora", "linear", "mixture", temperature=0.8),
    case("separate", "linear", "mixture", chunk=2, min_p=0.05),
    case("prompts", "linear", "mixture", carry=True),
    case("separate", "linear", "block", carry=True),
    case("prompts", "geometric", "auto", min_p=0.05),
    case("separate", "geometric", "auto", eos=4),
    case("lora", "linear", "auto"),
    case("prompts", "linear", "direct", eos=2),
    case("separate", "harmonic on a base", "block", bias=(5, 1, 2.0), eos=0),
]
DRAWN_BY = [
    ("direct", {}),
    ("token_rs", {}),
    ("token_rs", {"retries": 2}),
    *((sampler, {"draft": draft}) for sampler in ("verify", "block") for draft in ("reference", "ngram", "small")),
    ("block", {"draft": "merge"}),
    ("auto", {}),
]
SETTINGS_OF = [{}, {"min_p": 0.05}, {"temperature": 0.8, "min_p": 0.05}, {"policy_temperature": 0.7}, {"eos": 3}]
# A seventh of all combinations: each rule meets each sampler in some kind, and the settings take turns.
MORE = [
    case(kind, name, sampler, **more, **settings)
    for (kind, (sampler, more), name), settings in zip(
        [*itertools.product(exact.KINDS, DRAWN_BY, PERSONAS)][::7], itertools.cycle(SETTINGS_OF), strict=False
    )
    if not (sampler == "auto" and name == "linear")
]


@pytest.mark.parametrize(("kind", "name", "more"), CASES)
def test_texts_follow_the_target(kind, name, more):
    check(kind, name, more, FEW)


@pytest.mark.parametrize("kind", exact.KINDS)
def test_direct_texts_follow_the_target(kind):
    check(kind, "geometric", {"sampler": "direct"}, SAMPLES if kind == "lora" else FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "more"), CASES[::3])
def test_many_texts_follow_the_target(kind, name, more):
    check(kind, name, more, SAMPLES, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "more"), MORE)
def test_texts_follow_the_target_whatever_draws_them(kind, name, more):
    check(kind, name, more, FEW, seed=3)


@pytest.mark.parametrize(("p", "q"), [(0.95, 1.0), (1.0, 1.05)])
def test_a_weight_that_is_off_by_5_percent_is_caught(p, q):
    """Positive control, at the samples that the right weight passes with."""
    codes, _ = sampled("lora", "geometric", (("sampler", "direct"),), SAMPLES, 1)
    assert p_value(codes, exact.joint(world("lora"), persona(p=p, q=q))) < 1e-6


# What the texts would be if ...
WRONG = {
    "the support mask were missing": {},
    "the temperatures were exchanged": {"min_p": 0.05, "temperature": 0.7},
    "the temperature acted on nothing": {"min_p": 0.05},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_settings_are_caught(wrong):
    """Positive controls."""
    codes, _ = sampled(
        "lora", "geometric", (("sampler", "direct"), ("min_p", 0.05), ("policy_temperature", 0.7)), FEW, 1
    )
    right = {"min_p": 0.05, "policy_temperature": 0.7}
    assert p_value(codes, exact.joint(world("lora"), GEOMETRIC, **right)) > 1e-3
    expected = exact.joint(world("lora"), GEOMETRIC, **({"policy_temperature": 0.7} if not wrong else wrong))
    drawn = torch.isin(codes, expected.nonzero().flatten())
    assert not drawn.all() or p_value(codes, expected) < 1e-6


# Rows of one batch: what speaks, and after which prompt; shorter ones are padded at the left.
ROWS = [
    (PERSONAS["geometric"], [2, 5, 3]),
    (PERSONAS["harmonic"], [1]),
    (None, [4, 4]),
    (PERSONAS["geometric on a base"], [6, 0, 7, 1, 2]),
    (PERSONAS["function"], [3, 7]),
]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("lora", {"sampler": "direct", "min_p": 0.05}),
        ("separate", {"sampler": "block", "draft": "merge"}),
        pytest.param("prompts", {"sampler": "verify", "min_p": 0.05, "temperature": 0.8}, marks=pytest.mark.slow),
        pytest.param("separate", {"sampler": "token_rs", "temperature": 0.8}, marks=pytest.mark.slow),
    ],
)
def test_rows_with_their_own_personas_and_prompts_follow_their_own_targets(kind, more):
    """Beside rows without ratios, min_p is that of the target at temperature 1 here and stock's there."""
    longest = max(len(prompt) for _, prompt in ROWS)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for _, prompt in ROWS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for _, prompt in ROWS])
    copies = FEW // 3
    with world(kind).attach() as handle:
        out = world(kind).net.generate(
            ids.repeat(copies, 1),
            attention_mask=mask.repeat(copies, 1),
            custom_generate=handle.generate,
            personas=[given for given, _ in ROWS] * copies,
            do_sample=True,
            top_k=0,
            max_new_tokens=exact.LENGTH,
            pad_token_id=0,
            seed=5,
            **{"min_p": 0.0, **more},
        )
    settings = {name: value for name, value in more.items() if name in SETTINGS}
    for row, (given, prompt) in enumerate(ROWS):
        codes = exact.codes(out[row :: len(ROWS), longest:])
        if given is None:
            settings_of_row = {name: value for name, value in settings.items() if name != "min_p"}
            expected = exact.joint(world(kind), None, prompt, plain_min_p=settings.get("min_p", 0.0), **settings_of_row)
        else:
            expected = exact.joint(world(kind), given, prompt, **settings)
        assert p_value(codes, expected) > 1e-3, row


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("lora", "geometric", {"min_p": 0.05}),
        ("separate", "harmonic", {"temperature": 0.8}),
        ("prompts", "linear on a base", {"policy_temperature": 0.7}),
    ],
)
def test_stock_generate_with_our_processor_follows_the_target(kind, name, settings):
    ids = torch.tensor([exact.PROMPT]).repeat(BATCH, 1)
    ours = {key: value for key, value in settings.items() if key != "temperature"}
    codes = []
    torch.manual_seed(0)
    with world(kind).attach() as handle:
        for _ in range(1):
            processor = pf.MPGLogitsProcessor(handle, PERSONAS[name], ids, **{"min_p": 0.0, **ours})
            out = world(kind).net.generate(
                ids,
                logits_processor=[processor],
                do_sample=True,
                top_k=0,
                temperature=settings.get("temperature", 1.0),
                max_new_tokens=exact.LENGTH,
                pad_token_id=0,
            )
            codes.append(exact.codes(out[:, len(exact.PROMPT) :]))
    assert p_value(torch.cat(codes), exact.joint(world(kind), PERSONAS[name], **settings)) > 1e-3
