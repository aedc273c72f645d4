"""`sample_verify` against the token-level target by enumeration: whatever the chunk, the drafter and the batch."""

import pytest
import torch
from helpers.table import Certain, Tables, p_value, rule, sample, total_variation

from personafast.density import verify
from personafast.density.direct import sample_direct
from personafast.density.draft import Draft, ModelDrafter
from personafast.density.draws import Draws, Stream, choose
from personafast.density.verify import sample_verify
from personafast.ops import verify_draft

SAMPLES = 1_000_000
BATCH = 125_000
TABLES = Tables(policies=2)
NOISE = torch.randn(TABLES.logits.shape[1:], generator=torch.Generator().manual_seed(77))
# As a merge is: near the geometric target, so that drafts are kept, and not the same.
AHEAD = TABLES.logits[1] + TABLES.logits[2] - TABLES.logits[0] + 0.7 * NOISE
GEOMETRIC = ([1.0, 1.0], "geometric")
LINEAR = ([0.6, 0.4], "linear")


def colder(ids, scores):
    return scores / 0.7


def no_repeats(ids, scores):
    """Depends on the text: what led to a place must be shown to it."""
    last = ids[:, -1:]
    return scores.scatter_add(1, last, torch.full_like(last, -1.5, dtype=scores.dtype))


def drafter(kind, scorer, transcript, process=None, min_p=0.0):
    if kind == "certain":
        return Certain(TABLES.vocab)
    if kind == "like the target":
        return ModelDrafter(scorer, process=process, min_p=torch.full((transcript.alive.numel(),), min_p))
    # A draft that ends early ends by what was drafted, which must not matter.
    return ModelDrafter(scorer, doubt=0.05 if kind == "early" else 0.0)


def run_verify(target, kind, *, min_p=0.0, make=drafter, t=1.0, **more):
    def run(scorer, transcript, draws):
        of_rows = rule(transcript.alive.numel(), *target, min_p, t)
        made = make(kind, scorer, transcript, more.get("process"), min_p)
        sample_verify(scorer, transcript, of_rows, draws, made, **more)

    return run


def check(target, kind, seed, *, min_p=0.0, eos=(), rows=SAMPLES, batch=BATCH, **more):
    expected = TABLES.joint(rule(1, *target, min_p), more.get("process"), eos)
    ahead = None if kind == "reference" else AHEAD
    run = run_verify(target, kind, min_p=min_p, **more)
    code, stats = sample(run, TABLES, rows, seed, batch=batch, eos=eos, ahead=ahead)
    assert p_value(code, expected) > 1e-3
    assert total_variation(code, expected) < 0.01 * (SAMPLES / rows) ** 0.5
    return stats


# target, drafter, chunk, block and whatever else; every value of every option is in the default suite once.
CASES = [
    (GEOMETRIC, "reference", 1, False, {}),
    (GEOMETRIC, "reference", 3, True, {"min_p": 0.05}),
    (GEOMETRIC, "ahead", 2, True, {"eos": (3,)}),
    (GEOMETRIC, "early", 3, True, {}),
    (LINEAR, "ahead", 7, False, {"min_p": 0.05, "process": no_repeats}),
    (LINEAR, "certain", 3, True, {"process": colder}),
    (GEOMETRIC, "certain", 7, False, {"eos": (0,)}),
    (GEOMETRIC, "like the target", 2, False, {"min_p": 0.3, "process": colder, "eos": (1,)}),
    (LINEAR, "like the target", 3, True, {"min_p": 0.3, "process": no_repeats}),
]
MORE = [
    (target, kind, chunk, block, {"min_p": min_p, "eos": eos, "process": process})
    for target in (GEOMETRIC, LINEAR)
    for kind in ("reference", "ahead", "certain", "like the target")
    for chunk, eos in ((1, ()), (2, (3,)), (3, ()), (7, (2,)))
    for block in (False, True)
    for min_p, process in ((0.0, None), (0.05, no_repeats))
][::3]  # a third of all combinations meets every pair of options


@pytest.mark.parametrize(("target", "kind", "chunk", "block", "more"), CASES)
def test_texts_follow_the_target(target, kind, chunk, block, more):
    check(target, kind, 1, chunk=chunk, block=block, **more)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize(("target", "kind", "chunk", "block", "more"), MORE)
def test_texts_follow_the_target_for_more_seeds(target, kind, chunk, block, more, seed):
    check(target, kind, seed, chunk=chunk, block=block, **more)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_carried_weights_give_the_sequence_level_mixture(block):
    policies = [TABLES.joint(rule(1, weights, "linear")) for weights in ([1.0, 0.0], [0.0, 1.0])]
    expected = 0.3 * policies[0] + 0.7 * policies[1]
    run = run_verify(([0.3, 0.7], "linear"), "ahead", chunk=2, block=block, carry=True)
    code, _ = sample(run, TABLES, SAMPLES, 1, batch=BATCH, ahead=AHEAD)
    assert p_value(code, expected) > 1e-3
    assert p_value(code, TABLES.joint(rule(1, [0.3, 0.7], "linear"))) < 1e-6


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_without_drafts_the_tokens_are_those_of_direct(block):
    class Nothing(Certain):
        def draft(self, transcript, draws, chunk):
            return Draft.empty(transcript.alive.numel(), transcript.alive.device)

    def direct(scorer, transcript, draws):
        sample_direct(scorer, transcript, rule(transcript.alive.numel(), *GEOMETRIC, 0.05), draws, process=no_repeats)

    options = {"tables": TABLES, "rows": 20_000, "seed": 5, "batch": 3_000, "eos": (3,)}
    run = run_verify(GEOMETRIC, "", make=lambda *_: Nothing(4), min_p=0.05, chunk=3, block=block, process=no_repeats)
    assert torch.equal(sample(run, **options)[0], sample(direct, **options)[0])


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_a_text_does_not_depend_on_its_batch(block):
    options = {"tables": TABLES, "rows": 3000, "eos": (3,), "ahead": AHEAD}
    run = run_verify(GEOMETRIC, "like the target", min_p=0.05, chunk=2, block=block, process=no_repeats)
    whole, _ = sample(run, seed=5, batch=3000, **options)

    class Of(Draws):
        """The seeds of the whole batch, some rows at a time."""

        start = 0

        def __init__(self, seeds):
            every = torch.randint(2**62, (3000,), generator=torch.Generator().manual_seed(5 * 3000))
            super().__init__(every[Of.start : Of.start + seeds.numel()])
            Of.start += seeds.numel()

    parts, _ = sample(run, seed=5, batch=170, kind=Of, **options)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_identical_policies_accept_everything(block):
    same = Tables(policies=2, seed=3)
    same.logits[1:] = same.logits[0]
    run = run_verify(([0.8, 0.7], "geometric"), "reference", chunk=3, block=block)
    _, (stats,) = sample(run, same, 50_000, 1, batch=50_000)
    # Up to what rounding of the two makes of u < 1.
    assert stats.acceptance > 1 - 1e-4
    assert stats.tokens_per_round == pytest.approx(4, abs=1e-3)


@pytest.mark.parametrize("block", [False, True], ids=["token", "block"])
def test_acceptance_of_one_token_is_what_target_and_draft_share(block):
    one = Tables(policies=2, length=2, seed=6)
    run = run_verify(GEOMETRIC, "reference", chunk=1, block=block)
    _, (stats,) = sample(run, one, 500_000, 1, batch=500_000)
    shared = float(torch.minimum(one.law(rule(1, *GEOMETRIC), 0)[0], one.logits[0, 0].double().softmax(-1)).sum())
    first = stats.accepted / stats.proposed
    assert abs(first - shared) < 4 * (shared * (1 - shared) / stats.proposed) ** 0.5


def test_a_block_keeps_more_than_single_tokens_do():
    kept = []
    for block in (False, True):
        run = run_verify(GEOMETRIC, "ahead", chunk=3, block=block)
        _, (stats,) = sample(run, TABLES, 200_000, 1, batch=200_000, ahead=AHEAD)
        kept.append(stats.tokens_per_round)
    assert kept[1] > kept[0] + 0.005


@pytest.mark.parametrize("member", [0, 1])
def test_one_hot_weights_give_that_policy(member):
    weights = [float(i == member) for i in range(2)]
    expected = torch.ones(1, dtype=torch.float64)
    for count in range(TABLES.length):
        expected = (expected[:, None] * TABLES.members(count)[1 + member].double().softmax(-1)).flatten()
    run = run_verify((weights, "geometric"), "ahead", chunk=3)
    code, _ = sample(run, TABLES, 250_000, 1, batch=BATCH, ahead=AHEAD)
    assert p_value(code, TABLES.by_code(expected)) > 1e-3


class AcceptedByTheSameNumber(Draws):
    """A token is drafted and accepted by one uniform."""

    def uniform(self, stream, positions, n=1):
        return super().uniform(Stream.ACCEPT if stream == Stream.PROPOSE else stream, positions, n)


class ByOwnPosition(Draws):
    """A place that is drafted again in the next round meets the uniform it was drafted by before."""

    def uniform(self, stream, positions, n=1):
        if stream != Stream.PROPOSE:
            return super().uniform(stream, positions, n)
        return torch.cat([super(ByOwnPosition, self).uniform(stream, positions + j) for j in range(n)], dim=1)


def without_residual(logp, draft, tokens, lengths, seeds, positions, block):
    """What is refused is drawn from the target, not from what the draft leaves of it."""
    new, accepted = verify_draft(logp, draft, tokens, lengths, seeds, positions, block)
    rows, last = torch.arange(accepted.numel()), accepted.long()
    new[rows, last] = choose(logp[rows, last], Draws(seeds).uniform(Stream.SAMPLE, positions + last)[:, 0])
    return new, accepted


def off_by_one(logp, *others):
    """Every token is compared with the target of the place after it."""
    return verify_draft(torch.cat([logp[:, 1:], logp[:, -1:]], dim=1), *others)


@pytest.mark.parametrize(
    ("mistake", "block"),
    [
        (mistake, block)
        for mistake in (AcceptedByTheSameNumber, without_residual, off_by_one, ByOwnPosition)
        for block in (False, True)
        # Token by token, what was drafted behind a refused token decides nothing, so its uniform is as good as new.
        if block or mistake is not ByOwnPosition
    ],
)
def test_mistakes_are_caught(mistake, block, monkeypatch):
    """Positive controls: each must fail the test that the sampler passes."""
    more = {"kind": mistake} if isinstance(mistake, type) else {}
    if not more:
        monkeypatch.setattr(verify.ops, "verify_draft", mistake)
    run = run_verify(GEOMETRIC, "ahead", chunk=3, block=block)
    code, _ = sample(run, TABLES, 500_000, 1, batch=BATCH, ahead=AHEAD, **more)
    assert p_value(code, TABLES.joint(rule(1, *GEOMETRIC))) < 1e-6
