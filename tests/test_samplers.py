"""What every sampler does with rows, ends and outputs, through the public `generate`."""

import pytest
import torch
from helpers import tiny, voices
from helpers.voices import NEW, PERSONAS, Recorder, chats, row_of, speak
from transformers import TextStreamer
from transformers.generation import GenerateDecoderOnlyOutput

import personafast as pf
from personafast.density.draft import Draft
from personafast.models.patch import model_bytes

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
LINEAR = pf.Persona(policies={"formal": 0.5, "stern": 0.5}, aggregator="linear")
SAMPLED = [("verify", PERSONAS["mixed"]), ("block", PERSONAS["separate"]), ("mixture", LINEAR), ("token_rs", LINEAR)]


@pytest.fixture
def handle(net):
    with voices.attach(net) as found:
        yield found


class Stubborn:
    """A drafter that always says the same."""

    def __init__(self, tokens, deterministic=True):
        self.tokens, self.deterministic = tokens, deterministic

    def draft(self, transcript, draws, chunk):
        rows = transcript.alive.numel()
        tokens = torch.tensor(self.tokens[:chunk]).repeat(rows, 1)
        lengths = torch.full((rows,), tokens.shape[1], dtype=torch.int32)
        return Draft(tokens, None, lengths, deterministic=self.deterministic)

    def commit(self, tokens, counts):
        pass

    def keep(self, rows):
        pass


def drafts(net):
    return {
        "reference": "reference",
        "merge": "merge",
        "ngram": "ngram",
        "auto": "auto",
        "small model": tiny.model(seed=9),
        "reference's model": net,
        "drafter": Stubborn([5, 9, 9]),
    }


@pytest.mark.parametrize("kind", PERSONAS)
def test_greedy_drafts_change_nothing(net, handle, kind):
    batch = chats()
    expected = speak(net, handle, batch, PERSONAS[kind])
    assert not torch.equal(expected, speak(net, handle, batch, None))
    for name, draft in drafts(net).items():
        for sampler, chunk in (("verify", 3), ("block", 8)):
            found = speak(net, handle, batch, PERSONAS[kind], sampler=sampler, draft=draft, chunk=chunk)
            assert torch.equal(found, expected), (sampler, name)


def test_greedy_rows_may_have_different_kinds_of_policies(net, handle):
    batch = chats()
    rows = [PERSONAS["separate"], None, PERSONAS["mixed"]]
    expected = torch.cat([speak(net, handle, row_of(batch, row), rows[row]) for row in range(3)])
    for options in ({}, {"sampler": "verify"}, {"sampler": "block", "draft": "merge"}, {"sampler": "auto"}):
        assert torch.equal(speak(net, handle, batch, rows, **options), expected), options


def test_a_batch_may_have_more_merges_of_separate_models_than_are_kept(net, handle):
    batch = chats()
    rows = [pf.Persona(policies={"stern": alpha, "jolly": 0.5}) for alpha in (0.4, 0.8, 1.2)]
    expected = speak(net, handle, batch, rows)
    assert torch.equal(speak(net, handle, batch, rows, sampler="block", draft="merge"), expected)
    merged = speak(net, handle, batch, rows, sampler="merge")
    for row in range(3):
        alone = speak(net, handle, row_of(batch, row), rows[row], sampler="merge")
        assert torch.equal(merged[row], alone[0])


def test_a_merge_follows_the_weights_that_separate_models_have_now(net):
    given = voices.policies(net)
    batch, persona = chats(), PERSONAS["separate"]
    with voices.attach(net, given) as handle:
        before = speak(net, handle, batch, persona, sampler="merge")
        with torch.no_grad():
            for weight in given["stern"].model.parameters():
                weight.mul_(1.2)
        after = speak(net, handle, batch, persona, sampler="merge")
    with voices.attach(net, given) as handle:
        assert torch.equal(speak(net, handle, batch, persona, sampler="merge"), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(("sampler", "persona"), SAMPLED, ids=[sampler for sampler, _ in SAMPLED])
def test_a_rows_text_does_not_depend_on_its_batch(net, handle, sampler, persona):
    batch = chats()
    options = {"do_sample": True, "sampler": sampler, "personas": persona, "chunk": 3}
    together = speak(net, handle, batch, seeds=[7, 8, 9], **options)
    for row in range(3):
        alone = speak(net, handle, row_of(batch, row), seeds=[7 + row], **options)
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together, speak(net, handle, batch, seeds=[8, 9, 7], **options))
    again, same, other = (speak(net, handle, batch, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(again, same) and not torch.equal(again, other)


@pytest.mark.parametrize("kind", ["lora", "separate"])
@pytest.mark.parametrize("sampler", ["verify", "block"])
def test_an_eos_inside_a_draft_ends_its_row(net, handle, kind, sampler):
    batch, persona = chats(), PERSONAS[kind]
    free = speak(net, handle, batch, persona)
    eos = int(free[1, 4])
    # What is drafted goes on beyond the end: the drafter says the row's whole greedy text.
    options = {"sampler": sampler, "draft": Stubborn(free[1].tolist()), "eos_token_id": eos}
    out = speak(net, handle, row_of(batch, 1), persona, return_dict_in_generate=True, **options)
    end = free[1].tolist().index(eos) + 1
    assert out.sequences[0, -end:].tolist() == free[1, :end].tolist()
    assert out.stats.tokens == out.stats.proposed == out.stats.accepted == end and out.stats.rounds == 1
    many = torch.arange(3, tiny.VOCAB, 4)
    rows = chats(*["what is this", "sea", "law"] * 4)
    drawn = speak(net, handle, rows, persona, sampler=sampler, do_sample=True, seed=2, eos_token_id=many.tolist())
    ends = torch.isin(drawn, many).long()
    after = ends.cumsum(1) - ends > 0
    assert bool(after.any()) and bool((drawn[after] == 0).all()) and bool((drawn[~after] != 0).any())


@pytest.mark.parametrize("sampler", ["direct", "verify", "block"])
def test_stop_strings_end_their_own_row_only(net, handle, sampler):
    tok, batch, persona = tiny.tokenizer(), chats(), PERSONAS["separate"]
    free = speak(net, handle, batch, persona)
    stop = tok.convert_ids_to_tokens(int(free[0, 4]))
    out = speak(net, handle, batch, persona, sampler=sampler, stop_strings=[stop])
    ends = []
    for row in range(3):
        words = tok.convert_ids_to_tokens(free[row].tolist())
        end = words.index(stop) + 1 if stop in words else NEW
        kept = min(end, out.shape[1])
        assert out[row, :kept].tolist() == free[row, :kept].tolist() and bool((out[row, end:] == 0).all())
        ends.append(end)
    assert min(ends) < max(ends), "all rows end at once: the test is empty"


@pytest.mark.parametrize("sampler", ["verify", "block", "mixture", "token_rs"])
def test_streaming_gives_tokens_as_they_are_committed(net, handle, sampler):
    recorder, batch = Recorder(), chats("what is this")
    persona = LINEAR if sampler == "mixture" else PERSONAS["separate"]
    options = {"sampler": sampler, "chunk": 4, "do_sample": True, "seed": 3}
    out = speak(net, handle, batch, persona, streamer=recorder, **options)
    assert torch.equal(recorder.seen[0], batch["input_ids"]) and recorder.ended
    assert torch.equal(torch.cat(recorder.seen[1:]), out[0])
    assert torch.equal(speak(net, handle, batch, persona, **options), out)


def test_transformers_own_streamer_prints_a_blocks_text(net, handle, capsys):
    tok, batch = tiny.tokenizer(), chats("what is this")
    streamer = TextStreamer(tok, skip_prompt=True)
    out = speak(net, handle, batch, PERSONAS["separate"], sampler="block", streamer=streamer)
    assert capsys.readouterr().out.split() == tok.decode(out[0]).split()


def test_a_dict_carries_what_the_call_did(net, handle):
    batch, persona = chats(), PERSONAS["separate"]
    options = {"do_sample": True, "seed": 1, "return_dict_in_generate": True}
    out = speak(net, handle, batch, persona, sampler="auto", chunk=4, **options)
    stats = out.stats
    assert isinstance(out, GenerateDecoderOnlyOutput) and out["sequences"] is out.sequences
    assert stats.tokens == 3 * NEW and stats.rounds == int(stats.row_rounds.max())
    assert sum(stats.accepted_lengths) == int(stats.row_rounds.sum())
    assert sum(length * rows for length, rows in enumerate(stats.accepted_lengths)) == stats.accepted
    assert stats.acceptance == stats.accepted / stats.proposed and 0 < stats.acceptance < 1
    assert stats.log_z.shape == (3,) and bool(stats.log_z.isfinite().all())
    (why,) = stats.notes
    assert why.startswith("auto: block") and "merge" in why


def test_bytes_are_those_of_the_models_that_were_run(net, handle):
    batch = chats("sea")
    one = model_bytes(net)
    options = {"return_dict_in_generate": True}
    plain = speak(net, handle, batch, None, **options).stats
    direct = speak(net, handle, batch, PERSONAS["separate"], **options).stats
    assert plain.weight_bytes == NEW * one and direct.weight_bytes == 3 * NEW * one
    block = speak(net, handle, batch, PERSONAS["separate"], sampler="block", draft="ngram", **options).stats
    assert block.weight_bytes == 3 * block.rounds * one
    shared = speak(net, handle, batch, PERSONAS["lora"], **options).stats
    assert one < shared.bytes_per_token < 2 * one
    mixture = speak(net, handle, batch, LINEAR, sampler="mixture", do_sample=True, seed=1, **options).stats
    assert one <= mixture.bytes_per_token < 2 * one


def test_log_z_is_what_the_target_sums_to(net, handle):
    batch, persona = chats("sea"), PERSONAS["separate"]
    with torch.no_grad():
        logp0 = net(**batch).logits[0, -1].log_softmax(-1)
        members = [handle.cast.policies[name].model for name in persona.policies]
        ratios = [model(**batch).logits[0, -1].log_softmax(-1) - logp0 for model in members]
    alphas = persona.policies.values()
    wanted = (logp0 + sum(alpha * ratio for alpha, ratio in zip(alphas, ratios, strict=True))).logsumexp(-1)
    options = {"max_new_tokens": 1, "min_p": 0.0, "return_dict_in_generate": True, "do_sample": True}
    for sampler in ("direct", "block", "token_rs"):
        found = speak(net, handle, batch, persona, sampler=sampler, **options).stats.log_z
        torch.testing.assert_close(found, wanted[None], rtol=1e-4, atol=1e-4)
    options["max_new_tokens"] = 6
    half = pf.Persona(policies={"formal": 0.25, "stern": 0.25}, aggregator="linear")
    found = speak(net, handle, batch, half, sampler="mixture", chunk=2, **options).stats.log_z
    torch.testing.assert_close(found, torch.tensor([0.5]).log() * 3)
    assert speak(net, handle, batch, persona, sampler="scr", **options).stats.log_z.isfinite().all()


@pytest.mark.parametrize("sampler", ["verify", "block", "token_rs"])
def test_num_return_sequences_repeats_personas(net, handle, sampler):
    batch = chats("what is this", "sea")
    options = {"num_return_sequences": 3, "do_sample": True, "seeds": [1, 2, 3, 4, 5, 6], "sampler": sampler}
    out = speak(net, handle, batch, [PERSONAS["separate"], None], **options)
    alone = speak(net, handle, row_of(batch, 1), None, do_sample=True, seeds=[5])
    assert out.shape == (6, NEW) and len({tuple(row) for row in out.tolist()}) > 3
    if sampler == "token_rs":  # the draws of a row without ratios are the sampler's own
        alone = speak(net, handle, row_of(batch, 1), None, do_sample=True, seeds=[5], sampler=sampler)
        assert torch.equal(out[4], alone[0])


@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "token_rs", "scr"])
def test_a_base_takes_the_references_place(net, handle, sampler):
    """Without ratios a base speaks as it is; with them greedy texts are another's, the same for all exact samplers."""
    batch = chats()
    on_base = pf.Persona(policies={"stern": 0.7}, base="jolly")
    greedy = speak(net, handle, batch, on_base)
    if sampler != "scr":
        assert torch.equal(speak(net, handle, batch, on_base, sampler=sampler), greedy)
    assert not torch.equal(greedy, speak(net, handle, batch, pf.Persona(policies={"stern": 0.7})))
    options = {"do_sample": True, "seed": 1, "sampler": sampler}
    drawn = speak(net, handle, batch, on_base, **options)
    assert drawn.shape == (3, NEW)
    if sampler != "scr":
        alone = speak(net, handle, batch, pf.Persona(base="jolly"), min_p=0.0)
        model = handle.cast.policies["jolly"].model
        expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert torch.equal(alone, expected[:, -NEW:])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "gemma2", "opt"])
def test_drafts_are_rolled_back_row_by_row_in_every_family(family):
    """Rows keep different counts of a draft; positions, learned or rotary, follow what was kept."""
    if family == "opt":
        import transformers as t

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3}
        more = {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2}
        net = t.OPTForCausalLM(t.OPTConfig(vocab_size=tiny.VOCAB, **sizes, **more)).eval()
        net.generation_config.eos_token_id = None
    else:
        net = tiny.model(family)
    batch, persona = chats(), PERSONAS["mixed"]
    with voices.attach(net) as handle:
        expected = speak(net, handle, batch, persona)
        for draft in ("reference", "merge", "ngram", tiny.model(seed=9)):
            out = speak(
                net, handle, batch, persona, sampler="block", draft=draft, chunk=3, return_dict_in_generate=True
            )
            assert torch.equal(out.sequences[:, -NEW:], expected), draft
            assert out.stats.rounds > 1
        for row in range(3):
            assert torch.equal(speak(net, handle, row_of(batch, row), persona, sampler="block")[0], expected[row])
