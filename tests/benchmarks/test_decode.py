import contextlib

import pytest
import torch

from benchmarks import decode
from benchmarks.bandwidth import reader
from benchmarks.check import CheckFailed
from benchmarks.decode import DecodeCase, Judge, Runner, Shape, eight_rows, masked_copy, measure_decoding, one_row
from personafast.models.anatomy import anatomy

TINY = Shape(
    "tiny",
    {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # As large as in a wide model, or the embedding would outweigh the masked blocks.
        "initializer_range": 0.15,
    },
)


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch):
    monkeypatch.setattr("benchmarks.bandwidth.last_level_cache", lambda: 1 << 20)
    reader.cache_clear()
    yield
    reader.cache_clear()
    decode._made.clear()


def prompt(rows):
    return torch.randint(5, 320, (rows, decode.PROMPT), generator=torch.Generator().manual_seed(1))


def tiny(build, rows, *contenders):
    return DecodeCase("decode-tiny", TINY, contenders, build, rows=rows)


def test_batch_one_is_measured_against_unpatched_transformers():
    case = tiny(one_row, 1, decode.HF, "ours", "stock", "compressed")
    record = measure_decoding(case, tokens=8, rounds=2).record
    assert record["baseline"] == decode.HF and record["rounds"] == 2
    figures = record["contenders"]
    assert "times_faster" not in figures[decode.HF]
    for name in ("ours", "stock"):
        assert figures[name]["goal"] == 1.6 and figures[name]["times_faster"]["median"] > 0
        assert figures[name]["tokens_per_s"] == pytest.approx(1e6 / figures[name]["microseconds"]["median"], rel=1e-2)


def test_eight_masks_in_one_batch_decode_what_eight_copies_do():
    case = tiny(eight_rows, 8, "one by one", "batch")
    record = measure_decoding(case, tokens=4, rounds=2).record
    batch = record["contenders"]["batch"]
    assert batch["goal"] == 4.0 and batch["bytes"] < record["contenders"]["one by one"]["bytes"] / 4


def test_a_case_without_room_is_skipped(monkeypatch):
    monkeypatch.setattr("benchmarks.decode.machine.available_memory", lambda: 1000)
    with pytest.raises(decode.Absent, match="of memory"):
        measure_decoding(tiny(one_row, 1, decode.HF, "a", "b", "c"), 2, 1)


def test_wrong_tokens_and_masks_in_the_wrong_rows_are_refused():
    with torch.no_grad(), contextlib.ExitStack() as stack:
        model = decode.make_model(TINY)
        judge = Judge(model)
        copies, batch = eight_rows(model, prompt(8), stack)
        for runner in (copies, batch):
            assert 0 <= judge.check("right", runner) <= 1

        def other_word(tokens):
            return torch.cat((batch.generate(tokens)[:, :-1], prompt(8)[:, :1]), 1)

        for wrong in (
            Runner(other_word, 1, batch.masks),
            Runner(batch.generate, 1, tuple(reversed(batch.masks))),
            Runner(batch.generate, 1, (None,) * 8),
            Runner(lambda tokens: batch.generate(tokens - 1), 1, batch.masks),
        ):
            with pytest.raises(CheckFailed, match="wrong: "):
                judge.check("wrong", wrong)


def test_a_masked_copy_has_its_own_linears_and_shares_the_rest():
    with torch.no_grad():
        model = decode.make_model(TINY)
        mask = decode.random_mask(model, 3)
        twin = masked_copy(model, mask)
    assert twin.lm_head.weight is model.lm_head.weight
    assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    own = anatomy(twin).linears
    for path, linear in anatomy(model).linears.items():
        assert torch.equal(own[path].weight, linear.weight * mask.dense(path))
    assert 0.45 < mask.kept < 0.55
    assert not torch.equal(decode.random_mask(model, 4).words[path], mask.words[path])


def test_the_prompt_and_the_set_up_cancel(monkeypatch):
    clock = iter([0.0, 3.0 + 2 * 0.5, 10.0, 10.0 + 3.0 + 10 * 0.5])
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(clock))
    asked = []
    assert decode.per_token(asked.append, 8) == pytest.approx(0.5)
    assert asked == [2, 10]
