"""`sample_verify` beside its law: greedy, ragged rows, what it counts, and what goes wrong in it."""

import pytest
import torch
from helpers.table import Certain, Tables, TableScorer, draws, rule

from personafast.density.direct import sample_direct
from personafast.density.draft import Draft, ModelDrafter, NgramDrafter
from personafast.density.draws import Draws
from personafast.density.mixture import sample_mixture
from personafast.density.scr import ScrOptions, sample_scr
from personafast.density.token_rs import sample_token_rs
from personafast.density.transcript import Transcript
from personafast.density.verify import sample_verify
from personafast.errors import PersonafastError

TABLES = Tables(policies=2, vocab=3, length=10, seed=5)
ROWS = 60
PROMPT = torch.zeros(ROWS, 1, dtype=torch.long)


def no_repeats(ids, scores):
    return scores - 2.0 * (torch.arange(TABLES.vocab) == ids[:, -1:])


def transcript(eos=(), limit=TABLES.length, **more):
    return Transcript(PROMPT, limit, eos, **more)


def drafters(scorer):
    return {
        "reference": ModelDrafter(scorer, process=no_repeats),
        "certain": Certain(TABLES.vocab),
        "n-gram": NgramDrafter([[0, 1, 2, 0, 2, 1]] * ROWS),
    }


@pytest.mark.parametrize("kind", ["reference", "certain", "n-gram"])
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_greedy_is_that_of_direct(kind, block, chunk):
    of_rows = rule(ROWS, [0.0, 0.0], "geometric", 0.1)
    of_rows.weights = torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(1)) * 2
    wanted = transcript((2,))
    sample_direct(TableScorer(TABLES, ROWS), wanted, of_rows.select(torch.arange(ROWS)), None, process=no_repeats)
    found, scorer = transcript((2,)), TableScorer(TABLES, ROWS)
    drafter = drafters(scorer)[kind]
    sample_verify(scorer, found, of_rows, None, drafter, chunk=chunk, block=block, process=no_repeats)
    assert torch.equal(found.sequences(-1), wanted.sequences(-1))
    assert found.stats.rounds <= wanted.stats.rounds and found.stats.accepted > 0


class Watched(TableScorer):
    """Keeps what every row is told to commit, and how wide drafts are."""

    def __init__(self, tables, rows):
        super().__init__(tables, rows)
        self.rows, self.texts, self.widths = list(range(rows)), [[] for _ in range(rows)], []

    def score(self, draft, *, reference):
        self.widths.append(draft.shape[1])
        return super().score(draft, reference=reference)

    def commit(self, tokens, counts):
        super().commit(tokens, counts)
        assert tokens.min() >= 0
        for row, new, count in zip(self.rows, tokens.tolist(), counts.tolist(), strict=True):
            self.texts[row] += new[:count]

    def keep(self, rows):
        super().keep(rows)
        self.rows = [self.rows[row] for row in rows.tolist()]


@pytest.mark.parametrize("kind", ["reference", "certain", "n-gram"])
@pytest.mark.parametrize("block", [False, True])
def test_models_and_drafters_hold_the_text_of_the_transcript(kind, block):
    scorer, found = Watched(TABLES, ROWS), transcript((2,))
    drafter = drafters(scorer)[kind]
    told = []
    commit = drafter.commit
    drafter.commit = lambda tokens, counts: (told.append(int(counts.sum())), commit(tokens, counts))
    sample_verify(
        scorer, found, rule(ROWS, [0.6, 0.4], "linear"), draws(ROWS, 3), drafter, chunk=4, block=block, carry=True
    )
    assert found.alive.numel() < ROWS, "no row left the batch: the test is empty"
    for new, text in zip(scorer.texts, found.sequences(-1)[:, 1:].tolist(), strict=True):
        kept = [token for token in text if token >= 0]
        # A round gives one token more than it accepts; behind an EOS nobody looks at it.
        assert new[: len(kept)] == kept and (len(new) == len(kept) or kept[-1] == 2)
        assert 2 not in kept[:-1]
    stats = found.stats
    assert sum(told) == sum(map(len, scorer.texts))
    assert sum(stats.accepted_lengths) == int(stats.row_rounds.sum())
    assert sum(j * rows for j, rows in enumerate(stats.accepted_lengths)) == stats.accepted
    assert stats.accepted <= stats.proposed <= 4 * int(stats.row_rounds.sum())
    assert int(stats.row_rounds.max()) == stats.rounds
    assert stats.tokens_per_round == stats.tokens / int(stats.row_rounds.sum())
    assert max(scorer.widths) == 4


def test_a_draft_is_no_longer_than_what_the_row_with_the_most_room_needs():
    scorer, found = Watched(TABLES, ROWS), transcript(limit=4)
    sample_verify(scorer, found, rule(ROWS, [1.0, 1.0], "geometric"), draws(ROWS, 3), ModelDrafter(scorer), chunk=20)
    assert scorer.widths[0] == 3 and max(scorer.widths) == 3


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_target_with_nothing_left_is_named(value, block, greedy):
    def process(ids, scores):
        return torch.where((torch.arange(ids.shape[0]) == 1)[:, None] & (ids.shape[1] == 3), value, scores)

    found, scorer = transcript(), TableScorer(TABLES, ROWS)
    with pytest.raises(PersonafastError, match="^target: row 1 of the batch has no token left"):
        sample_verify(
            scorer,
            found,
            rule(ROWS, [1.0, 1.0], "geometric"),
            None if greedy else draws(ROWS, 3),
            Certain(3),
            chunk=3,
            block=block,
            process=process,
        )


@pytest.mark.parametrize("greedy", [False, True])
def test_direct_names_a_target_with_nothing_left(greedy):
    with pytest.raises(PersonafastError, match="^target: row 0 of the batch has no token left"):
        sample_direct(
            TableScorer(TABLES, ROWS),
            transcript(),
            rule(ROWS, [1.0, 1.0], "geometric"),
            None if greedy else draws(ROWS, 3),
            process=lambda ids, scores: torch.full_like(scores, -torch.inf),
        )


@pytest.mark.parametrize("block", [False, True])
def test_nothing_left_behind_a_refused_token_or_in_an_ended_row_is_no_fault(block):
    """A constraint may have nothing to say about texts that it forbids, or that are over."""

    def process(ids, scores):
        scores = scores.masked_fill(torch.arange(3) == 1, -torch.inf)
        over = ((ids == 1) | (ids == 2)).any(dim=1)
        return torch.where(over[:, None], torch.nan, scores)

    class Forbidden(Certain):
        def draft(self, transcript, draws, chunk):
            tokens = torch.tensor([0, 1, 0]).repeat(transcript.alive.numel(), 1)[:, :chunk]
            return Draft(tokens, None, torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.int32), True)

    found, scorer = transcript((2,), may_shrink=False), TableScorer(TABLES, ROWS)
    of_rows = rule(ROWS, [1.0, 1.0], "geometric")
    sample_verify(scorer, found, of_rows, draws(ROWS, 3), Forbidden(3), chunk=3, block=block, process=process)
    texts = found.sequences(-1)
    assert not (texts == 1).any() and (texts == 2).any()
    alone = transcript((2,), may_shrink=False)
    sample_direct(TableScorer(TABLES, ROWS), alone, of_rows, draws(ROWS, 3), process=process)
    assert not (alone.sequences(-1) == 1).any()


def failing(*_):
    raise KeyError("mine")


@pytest.mark.parametrize("block", [False, True])
def test_an_exception_of_the_caller_comes_through(block):
    with pytest.raises(KeyError, match="mine"):
        scorer = TableScorer(TABLES, ROWS)
        sample_verify(
            scorer,
            transcript(),
            rule(ROWS, [1.0, 1.0], "geometric"),
            draws(ROWS, 3),
            ModelDrafter(scorer),
            chunk=3,
            block=block,
            process=failing,
        )


def test_a_policy_speaks_up_to_where_its_row_ends():
    scorer, found = Watched(TABLES, ROWS), transcript((2,))
    asked = []
    speak = scorer.speak
    scorer.speak = lambda member, draft: (asked.append(draft.shape[1]), speak(member, draft))[1]
    sample_mixture(scorer, found, rule(ROWS, [0.6, 0.4], "linear"), draws(ROWS, 3), chunk=4)
    texts = [[token for token in text if token >= 0] for text in found.sequences(-1)[:, 1:].tolist()]
    assert scorer.texts == texts and any(len(text) % 4 for text in texts)
    assert max(asked) == 3
    # One row alone, whose second token ends it: nobody is asked for a third.
    row = next(i for i, text in enumerate(texts) if len(text) == 2)
    alone, asked[:] = Transcript(PROMPT[:1], TABLES.length, (2,)), []
    scorer = Watched(TABLES, 1)
    speak, scorer.speak = scorer.speak, lambda member, draft: (asked.append(draft.shape[1]), speak(member, draft))[1]
    u = draws(ROWS, 3)
    u.keep(torch.tensor([row]))
    sample_mixture(scorer, alone, rule(1, [0.6, 0.4], "linear"), u, chunk=4)
    assert scorer.texts == [texts[row]] and asked == [0, 1]


def test_proposals_come_from_what_stands_for_the_reference():
    """A policy as base and no ratios: the target is what proposes, and all proposals stand."""
    of_rows, found = rule(ROWS, [0.0, 0.0], "geometric"), transcript()
    of_rows.base = torch.ones(ROWS, dtype=torch.long)
    sample_token_rs(TableScorer(TABLES, ROWS), found, of_rows, draws(ROWS, 1))
    assert found.stats.acceptance == 1


def faulty(**changes):
    of_rows = rule(ROWS, [0.6, 0.4], "linear")
    for name, value in changes.items():
        setattr(of_rows, name, value)
    return of_rows


@pytest.mark.parametrize(
    ("of_rows", "fault"),
    [
        (faulty(aggregator=torch.ones(ROWS, dtype=torch.int32)), "row 0: its rule is not linear"),
        (faulty(weights=torch.tensor([[0.6, 0.4]] * 59 + [[1.2, -0.2]])), "row 59: a weight is negative"),
        (faulty(weights=torch.tensor([[0.6, 0.4]] * 59 + [[0.0, 0.0]])), "row 59: no policy has a weight"),
        (faulty(base=torch.tensor([-1, 1] + [-1] * 58)), "row 1: a policy stands for its reference"),
        (faulty(custom=[None, None, failing] + [None] * 57), "row 2: its rule is a function"),
    ],
)
def test_what_is_no_mixture_is_refused(of_rows, fault):
    with pytest.raises(PersonafastError, match=f"^sampler: 'mixture' cannot sample {fault}; use 'direct' or 'verify'$"):
        sample_mixture(TableScorer(TABLES, ROWS), transcript(), of_rows, draws(ROWS, 1), chunk=2)


def test_a_mixture_has_no_greedy_form():
    with pytest.raises(PersonafastError, match="^sampler: 'mixture' draws a policy at random"):
        sample_mixture(TableScorer(TABLES, ROWS), transcript(), faulty(), None, chunk=2)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (sample_mixture, {"chunk": 0}, "^chunk: 0 is not at least 1$"),
        (sample_token_rs, {"retries": 0}, "^retries: 0 is not at least 1$"),
        (sample_verify, {"drafter": Certain(3), "chunk": 0}, "^chunk: 0 is not at least 1$"),
    ],
)
def test_sizes_below_one_are_refused(sampler, options, message):
    with pytest.raises(PersonafastError, match=message):
        sampler(TableScorer(TABLES, ROWS), transcript(), faulty(), draws(ROWS, 1), **options)


def normaliser(text, weights, aggregator, min_p, t, base=None):
    """Sum over a text's tokens of log sum_y b(y) g(r(y)) over the support, in float64."""
    total, code = 0.0, 0
    for place, token in enumerate(text):
        index = TABLES.row(torch.tensor(code), torch.tensor(place))
        logp = (TABLES.logits[:, index].double() / t).log_softmax(-1)
        ratios = logp[1:] - logp[0]
        w = torch.tensor(weights, dtype=torch.float64)[:, None]
        log_g = (w.log() + ratios).logsumexp(0) if aggregator == "linear" else (w * ratios).sum(0)
        used = [logp[1 + i] for i, weight in enumerate(weights) if weight]
        if base is not None:
            used.append(logp[1 + base])
        elif aggregator == "geometric" and 1 - sum(weights) > 1e-6:
            used.append(logp[0])
        support = torch.stack([p >= p.max() + torch.tensor(min_p).log() for p in used]).any(0)
        of_base = logp[0] if base is None else logp[1 + base]
        total += float((of_base + log_g)[support].logsumexp(0))
        code = code * TABLES.vocab + token
    return total


NORMALISED = [
    ([0.9, 0.8], "geometric", 0.0, 0.7, None),
    ([0.3, 0.2], "geometric", 0.5, 1.0, None),
    ([0.9, 0.6], "linear", 0.0, 1.0, None),
    ([0.7, 0.0], "geometric", 0.0, 1.0, 1),
]


@pytest.mark.parametrize(
    ("sampler", "weights", "aggregator", "min_p", "t", "base"),
    [(name, *case) for name in ("direct", "verify", "block", "token_rs") for case in NORMALISED]
    + [("mixture", *case) for case in NORMALISED if case[1] == "linear"],
)
def test_log_z_is_what_the_targets_sum_to(sampler, weights, aggregator, min_p, t, base):
    of_rows = rule(ROWS, weights, aggregator, min_p, t)
    if base is not None:
        of_rows.base = torch.full((ROWS,), base)
    scorer, found, u = TableScorer(TABLES, ROWS), transcript((2,)), draws(ROWS, 4)
    # Processors come after the target that is meant.
    more = {"want_log_z": True} if sampler == "mixture" else {"want_log_z": True, "process": no_repeats}
    if sampler == "direct":
        sample_direct(scorer, found, of_rows, u, **more)
    elif sampler == "token_rs":
        sample_token_rs(scorer, found, of_rows, u, **more)
    elif sampler == "mixture":
        sample_mixture(scorer, found, of_rows, u, chunk=1, **more)
    else:
        sample_verify(scorer, found, of_rows, u, ModelDrafter(scorer), chunk=3, block=sampler == "block", **more)
    assert found.stats.log_z.dtype == torch.float32
    for row, text in enumerate(found.sequences(-1)[:, 1:].tolist()):
        wanted = normaliser([token for token in text if token >= 0], weights, aggregator, min_p, t, base)
        assert float(found.stats.log_z[row]) == pytest.approx(wanted, abs=2e-5)


def log_sum(ratios, weights):
    return (weights.log().view(-1, *[1] * (ratios.dim() - 1)) + ratios).logsumexp(0)


@pytest.mark.parametrize("sampler", ["direct", "verify", "token_rs", "scr"])
def test_log_z_of_a_row_that_is_its_reference_is_zero(sampler):
    of_rows = rule(ROWS, [0.5, 0.2], "geometric")
    of_rows.weights[::2] = 0
    if sampler != "scr":  # What a function makes of no ratios at all does not matter.
        of_rows.custom = [log_sum] * ROWS
    scorer, found, u = TableScorer(TABLES, ROWS), transcript((2,)), draws(ROWS, 4)
    if sampler == "direct":
        sample_direct(scorer, found, of_rows, u, want_log_z=True)
    elif sampler == "token_rs":
        sample_token_rs(scorer, found, of_rows, u, want_log_z=True)
    elif sampler == "scr":
        sample_scr(scorer, found, of_rows, u, ScrOptions(), want_log_z=True)
    else:
        sample_verify(scorer, found, of_rows, u, ModelDrafter(scorer), chunk=2, want_log_z=True)
    assert not found.stats.log_z[::2].any() and found.stats.log_z[1::2].all()


def test_carried_ratios_leave_nothing_to_normalise():
    for sampler in ("direct", "verify"):
        scorer, found, u = TableScorer(TABLES, ROWS), transcript((2,)), draws(ROWS, 4)
        more = {"carry": True, "want_log_z": True}
        if sampler == "direct":
            sample_direct(scorer, found, rule(ROWS, [0.9, 0.3], "linear"), u, **more)
        else:
            sample_verify(scorer, found, rule(ROWS, [0.9, 0.3], "linear"), u, ModelDrafter(scorer), chunk=3, **more)
        torch.testing.assert_close(found.stats.log_z, torch.zeros(ROWS), atol=2e-5, rtol=0)


def test_log_z_is_made_only_when_asked_for():
    found = transcript()
    sample_direct(TableScorer(TABLES, ROWS), found, faulty(), Draws(torch.arange(ROWS)))
    assert found.stats.log_z is None
