"""Drafts: what is refused before any token is emitted, and what a row's own text proposes."""

import pytest
import torch
from helpers.table import Certain, Tables, TableScorer, draws, rule

from personafast.density.draft import Draft, ModelDrafter, NgramDrafter, lengths_in_row
from personafast.density.draws import Stream
from personafast.density.transcript import Transcript
from personafast.density.verify import sample_verify
from personafast.errors import PersonafastError

TABLES = Tables(policies=1, length=12)
ROWS = 3


class Given(Certain):
    """Drafts the same thing every time."""

    def __init__(self, draft):
        self.made = draft

    def draft(self, transcript, draws, chunk):
        return self.made


class Untouched(TableScorer):
    """Models that must not be run."""

    def score(self, draft, *, reference):
        raise AssertionError("the draft reached the models")


def uniform_law(rows=ROWS, width=2):
    return torch.full((rows, width, TABLES.vocab), 0.25).log()


def given(**changes):
    fields = {"tokens": torch.zeros(ROWS, 2, dtype=torch.long), "lengths": torch.full((ROWS,), 2, dtype=torch.int32)}
    return Draft(**{**fields, "logp": uniform_law(), **changes})


impossible = uniform_law()
impossible[1, 1] = torch.tensor([0.0, 0.5, 0.5, 0.0]).log()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logp": None}, "the probabilities are missing"),
        ({"tokens": torch.zeros(ROWS, 2)}, r"`tokens` is float32 \[3, 2\], expected int64 \[3, j\] with j at most 2"),
        ({"tokens": torch.zeros(2, 2, dtype=torch.long)}, r"`tokens` is int64 \[2, 2\]"),
        ({"tokens": torch.zeros(ROWS, 3, dtype=torch.long)}, "j at most 2"),
        ({"lengths": torch.zeros(ROWS)}, r"`lengths` is float32 \[3\], expected int32 \[3\]"),
        ({"lengths": torch.tensor([0, 3, 0], dtype=torch.int32)}, "`lengths` of row 1 is 3, expected 0 to 2"),
        ({"lengths": torch.tensor([0, 0, -1], dtype=torch.int32)}, "`lengths` of row 2 is -1"),
        ({"tokens": torch.tensor([[0, 0], [0, 4], [0, 0]])}, "`tokens` of row 1 hold 4, expected 0 to 3"),
        ({"tokens": torch.tensor([[0, -1], [0, 0], [0, 0]])}, "`tokens` of row 0 hold -1"),
        ({"logp": None, "deterministic": True, "tokens": torch.full((ROWS, 2), 4)}, "hold 4, expected 0 to 3"),
        ({"logp": uniform_law(width=1)}, r"`logp` is float32 \[3, 1, 4\], expected floating \[3, 2, 4\]"),
        ({"logp": uniform_law()[..., :3]}, r"`logp` is float32 \[3, 2, 3\]"),
        ({"logp": uniform_law().long()}, "`logp` is int64"),
        ({"logp": uniform_law() + 0.01}, "`logp` of row 0, place 0 sums to 1.01005, expected 1"),
        ({"logp": uniform_law().exp()}, "expected 1: the normalised log-probabilities"),
        ({"logp": uniform_law() * torch.nan}, "sums to nan"),
        ({"logp": impossible}, "`logp` of row 1 gives its token at place 1 no probability"),
    ],
)
def test_what_a_drafter_gets_wrong_is_named_before_a_model_runs(changes, message):
    transcript = Transcript(torch.zeros(ROWS, 1, dtype=torch.long), TABLES.length, ())
    with pytest.raises(PersonafastError, match=f"^draft: .*{message}"):
        sample_verify(
            Untouched(TABLES, ROWS),
            transcript,
            rule(ROWS, [1.0], "geometric"),
            draws(ROWS, 1),
            Given(given(**changes)),
            chunk=2,
            vocabulary=TABLES.vocab,
        )
    assert transcript.stats.tokens == 0


def test_what_lies_beyond_a_row_is_not_looked_at():
    law = uniform_law()
    law[:, 1] = torch.nan
    lengths = torch.ones(ROWS, dtype=torch.int32)
    given(tokens=torch.tensor([[0, 99], [1, -5], [2, 3]]), logp=law, lengths=lengths).check_values()


def test_a_draft_ends_behind_an_eos_and_one_token_before_the_row():
    transcript = Transcript(torch.zeros(4, 1, dtype=torch.long), 4, (3,))
    transcript.append(torch.tensor([[0], [0], [3], [0]]), torch.tensor([1, 1, 1, 0]))
    tokens = torch.tensor([[3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 3, 0, 0]])
    draft = Draft(tokens, None, torch.tensor([4, 4, 4, 3], dtype=torch.int32), deterministic=True)
    found = lengths_in_row(transcript, draft, 4)
    assert found.tolist() == [1, 2, 0, 2] and found.dtype == torch.int32
    assert lengths_in_row(transcript, draft, 1).tolist() == [1, 1, 0, 1]


def drafted(prompts, new, chunk, longest=3, limit=20):
    """The drafts of `NgramDrafter` after some more text."""
    drafter = NgramDrafter(prompts, longest)
    transcript = Transcript(torch.zeros(len(prompts), 1, dtype=torch.long), limit, ())
    count = max(map(len, new))
    if count:
        tokens = torch.tensor([row + [0] * (count - len(row)) for row in new])
        counts = torch.tensor([len(row) for row in new])
        transcript.append(tokens, counts)
        drafter.commit(tokens, counts)
    draft = drafter.draft(transcript, None, chunk)
    assert draft.logp is None and draft.deterministic
    assert draft.tokens.shape[1] == int(draft.lengths.max())
    return [row[:n] for row, n in zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("prompt", "new", "found"),
    [
        ([1, 2, 3, 4, 1, 2], [], [3, 4, 1]),  # two tokens
        ([1, 2, 3, 4], [1, 2], [3, 4, 1]),  # partly generated
        ([5, 2, 9, 1, 2, 8, 5], [2], [9, 1, 2]),  # the longer match wins over the later one
        ([1, 2, 7, 1, 2, 8, 1], [2], [8, 1, 2]),  # the latest of equals
        ([3, 1, 2, 3, 9, 4, 2, 3, 8, 1, 2], [3], [9, 4, 2]),  # three tokens over two
        ([1, 2, 3], [], []),  # nothing stood there before
        ([6, 6], [6], [6]),  # a row that repeats itself: what followed has been copied up to its end
        ([4], [], []),
    ],
)
def test_ngrams_propose_what_followed(prompt, new, found):
    assert drafted([prompt], [new], 3) == [found]


def test_ngrams_of_rows_are_their_own():
    prompts, new = [[1, 2, 3, 1], [2, 3, 1], [7, 8, 7]], [[2], [5, 5], []]
    assert drafted(prompts, new, 2) == [[3, 1], [5], [8, 7]]
    drafter = NgramDrafter(prompts)
    drafter.keep(torch.tensor([2, 0]))
    transcript = Transcript(torch.zeros(2, 1, dtype=torch.long), 20, ())
    assert drafter.draft(transcript, None, 2).tokens.tolist() == [[8, 7], [2, 3]]


def test_ngrams_leave_room_for_the_token_that_follows():
    assert drafted([[1, 2, 3, 4, 1]], [[2]], 5, limit=3) == [[3]]
    assert drafted([[1, 2, 3, 4, 1]], [[2]], 5, limit=2) == [[]]


def test_a_shorter_longest_ngram_finds_the_later_occurrence():
    assert drafted([[5, 2, 9, 1, 2, 8, 5]], [[2]], 1, longest=1) == [[8]]
    with pytest.raises(PersonafastError, match="^longest: 0 is not at least 1$"):
        NgramDrafter([[1]], longest=0)


def test_a_model_drafts_from_the_law_it_stores():
    """Temperature, then its support mask, then the warpers, each as the target has them."""
    min_p = torch.tensor([0.0, 0.2, 0.6])
    seen = []

    def process(ids, scores):
        seen.append(ids.tolist())
        return scores / 0.7

    scorer, transcript = TableScorer(TABLES, ROWS), Transcript(torch.zeros(ROWS, 1, dtype=torch.long), 12, (3,))
    drafter, uniforms = ModelDrafter(scorer, temperature=1.3, min_p=min_p, process=process), draws(ROWS, 2)
    draft = drafter.draft(transcript, uniforms, 3)
    draft.check(ROWS, 3, TABLES.vocab)
    draft.check_values()
    u = uniforms.uniform(Stream.PROPOSE, transcript.positions, 3)
    for row in range(ROWS):
        code = 0
        for place in range(int(draft.lengths[row])):
            index = TABLES.row(torch.tensor(code), torch.tensor(place))
            p = (TABLES.logits[0, index].double() / 1.3).softmax(0)
            p = torch.where(p >= float(min_p[row]) * p.max(), p, 0.0) ** (1 / 0.7)
            p = p / p.sum()
            torch.testing.assert_close(draft.logp[row, place].double().exp(), p, atol=1e-6, rtol=1e-5)
            token = int(draft.tokens[row, place])
            assert token == int((p.cumsum(0) <= u[row, place]).sum())
            assert seen[place][row] == [0, *draft.tokens[row, :place].tolist()]
            code = code * TABLES.vocab + token
        ended = int(draft.tokens[row, draft.lengths[row] - 1]) == 3
        assert int(draft.lengths[row]) == 3 or ended
    drafter.keep(torch.tensor([2]))
    assert drafter._min_p.tolist() == pytest.approx([0.6])


def test_a_model_runs_only_as_far_as_some_row_goes():
    calls = []

    class Counted(TableScorer):
        def propose(self, draft):
            calls.append(draft.shape[1])
            logits = super().propose(draft)
            return torch.where(torch.arange(4) == 3, 50.0, logits) if draft.shape[1] == 1 else logits

    transcript = Transcript(torch.zeros(ROWS, 1, dtype=torch.long), 12, (3,))
    draft = ModelDrafter(Counted(TABLES, ROWS)).draft(transcript, draws(ROWS, 2), 8)
    assert calls == [0, 1] and draft.tokens.shape == (ROWS, 2)


def test_a_draft_ends_where_it_would_rather_be_refused():
    rows, doubt = 500, 0.05
    transcript = Transcript(torch.zeros(rows, 1, dtype=torch.long), TABLES.length, eos=())
    whole, ended = (
        ModelDrafter(TableScorer(TABLES, rows), doubt=c).draft(transcript, draws(rows, 2), 8) for c in (0.0, doubt)
    )
    assert (whole.lengths == 8).all()
    # The same draws: what is drafted is the same as far as it goes.
    width = ended.tokens.shape[1]
    assert torch.equal(ended.tokens, whole.tokens[:, :width])
    p = whole.logp.gather(2, whole.tokens[..., None])[..., 0].exp()
    stands = (p / (p + doubt * (1 - p))).cumprod(1)
    wanted = ((stands >= 0.5).long().cumprod(1).sum(1) + 1).clamp(max=8)
    assert torch.equal(ended.lengths.long(), wanted)
    assert wanted.unique().numel() > 3
