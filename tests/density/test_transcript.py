"""Rows of different lengths in one transcript: what criteria and processors see of them, and when they may leave."""

import pytest
import torch
from helpers import tiny
from transformers import LogitsProcessor, LogitsProcessorList

import personafast as pf
from personafast.density.stopping import StopStrings
from personafast.density.transcript import Transcript

PROMPT = torch.tensor([[1, 2], [3, 4], [5, 6]])
NEW = 12


def ends(ids, text):
    """Whether a row of ids ends with a text."""
    return ids[-len(text) :].tolist() == text


def test_ragged_rows_are_aligned_at_the_right():
    transcript = Transcript(PROMPT, 10, eos=())
    tokens = torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32]])
    transcript.append(tokens, torch.tensor([1, 3, 2]))
    assert transcript.positions.tolist() == [1, 3, 2]
    ids = transcript.ids()
    assert ids.shape == (3, 5)
    for row, text in zip(ids, ([1, 2, 10], [3, 4, 20, 21, 22], [5, 6, 30, 31]), strict=True):
        assert ends(row, text)
    transcript.append(tokens + 3, torch.tensor([3, 1, 1]))
    for row, text in zip(transcript.ids(), ([10, 13, 14, 15], [21, 22, 23], [30, 31, 33]), strict=True):
        assert ends(row, text)


def test_a_criterion_sees_the_newest_token_of_every_row_at_the_end():
    seen = []

    def criterion(ids, _):
        seen.append(ids)
        return ids[:, -1] == 31

    transcript = Transcript(PROMPT, 10, eos=(), criteria=[criterion])
    transcript.append(torch.tensor([[10, 11], [20, 21], [30, 31]]), torch.tensor([1, 2, 1]))
    ended = transcript.append(torch.tensor([[12, 13], [22, 23], [31, 32]]), torch.tensor([2, 1, 2]))
    assert ended.tolist() == [False, False, True]
    texts = [[1, 2, 10, 12, 13], [3, 4, 20, 21, 22], [5, 6, 30, 31]]
    assert transcript.sequences(0).tolist() == [text + [0] * (5 - len(text)) for text in texts]
    # Whatever a call shows of a row, it ends with some part of that row's text.
    for row in (row for ids in seen for row in ids):
        text = texts[[10, 20, 30].index(next(int(token) for token in row if token in (10, 20, 30)))]
        assert any(ends(row, text[:count]) for count in range(3, len(text) + 1))


def test_rows_that_have_ended_do_not_count():
    transcript = Transcript(PROMPT, 4, eos=(9,))
    transcript.count(torch.tensor([3, 3, 2]), torch.tensor([0, 3, 1]))
    transcript.append(torch.tensor([[9, 0, 0, 0], [1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([1, 4, 2]))
    # Two rows have ended. Whatever is said of them from here on is for show.
    before = transcript.positions
    transcript.count(torch.tensor([3, 3, 1]), torch.tensor([3, 3, 1]))
    transcript.append(torch.tensor([[7, 7], [7, 7], [7, 9]]), torch.tensor([2, 2, 2]))
    transcript.add_log_z(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.5, 0.25, torch.nan]]), before)
    stats = transcript.stats
    assert (stats.proposed, stats.accepted, stats.tokens, stats.rounds) == (9, 5, 9, 2)
    assert stats.accepted_lengths == [1, 2, 0, 1]
    assert stats.row_rounds.tolist() == [1, 1, 2]
    assert stats.log_z.tolist() == [0, 0, 0.75]
    assert stats.tokens_per_round == 9 / 4
    stats.weight_bytes = 18
    assert stats.bytes_per_token == 2


class Counting(LogitsProcessor):
    """Holds a state a row, as some processors do, and so must see all rows at every step."""

    def __init__(self):
        self.rows = []

    def __call__(self, input_ids, scores):
        self.rows.append(scores.shape[0])
        return scores


@pytest.fixture
def ending():
    """A call over eight rows that end at different times."""
    ids = torch.randint(3, tiny.VOCAB, (8, 5), generator=torch.Generator().manual_seed(9))
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": True}
    return {**options, "top_k": 0, "seed": 2, "eos_token_id": list(range(3, 16)), "return_dict_in_generate": True}


@pytest.mark.usefixtures("reference_backend")
def test_rows_stay_under_a_processor_that_may_hold_a_state(net, library, ending):
    persona, counting = pf.Persona(policies={"formal": 0.6}), Counting()
    with pf.attach(net, library) as handle:
        ending = {**ending, "custom_generate": handle.generate, "personas": persona}
        free = net.generate(**ending)
        held = net.generate(**ending, logits_processor=LogitsProcessorList([counting]))
        warped = net.generate(**{**ending, "temperature": 0.999999})
    assert set(counting.rows) == {8} and len(counting.rows) == held.stats.rounds
    assert held.stats.forwards == 2 * 8 * held.stats.rounds
    assert torch.equal(free.sequences, held.sequences)
    # Without one, rows that have ended leave; warpers without a state do not hold them.
    assert free.stats.forwards < held.stats.forwards
    assert warped.stats.forwards < 2 * 8 * warped.stats.rounds


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("stop", ["sea", "law ship", "sea law ship"])
@pytest.mark.parametrize("sampler", ["direct", "scr"])
def test_a_stop_string_in_the_prompt_does_not_end_the_row(net, library, sampler, stop):
    tok = tiny.tokenizer()
    ids = tok("what is this sea law ship", add_special_tokens=False, return_tensors="pt")["input_ids"].repeat(3, 1)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "seed": 1}
    options |= {"do_sample": True, "top_k": 0, "sampler": sampler, "personas": pf.Persona(policies={"formal": 0.5})}
    with pf.attach(net, library, tokenizer=tok) as handle:
        options["custom_generate"] = handle.generate
        free = net.generate(**options)[:, ids.shape[1] :]
        found = net.generate(**options, stop_strings=[stop])[:, ids.shape[1] :]
    for row, whole in zip(found, free, strict=True):
        # Where the row itself says it, if it does.
        end = next((n for n in range(1, NEW + 1) if stop in tok.decode(whole[:n])), NEW)
        assert row[:end].tolist() == whole[:end].tolist() and not row[end:].any()
    assert found.shape[1] == NEW


class Bytes:
    """A tokenizer of one token a byte, whose last token may change how the one before it is written."""

    @staticmethod
    def decode(ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "completes"),
    [("é, ü", "é", False), ("é, ü", "ü", True), ("é, é", "é", True), ("é, é", ", é", True), ("ü", "é", False)],
)
def test_a_stop_string_is_counted_where_a_character_takes_several_tokens(text, stop, completes):
    whole = torch.tensor([list(text.encode())])
    stops = StopStrings(Bytes, [stop, "as long as the whole text"])
    assert stops(whole).tolist() == [completes]
    assert stops(whole[:, :-1]).tolist() == [False]
