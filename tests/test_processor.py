"""`MPGLogitsProcessor` in transformers' own `generate`, against our decoding loop."""

import pytest
import torch
from helpers import tiny, voices
from helpers.voices import NEW, PERSONAS, chats, row_of, speak
from transformers import LogitsProcessorList

import personafast as pf

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore:A decoder-only")]


def stock(net, processor, batch, **more):
    """New tokens of stock generate with our processor."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}
    out = net.generate(**batch, logits_processor=LogitsProcessorList([processor]), **options)
    return out[:, batch["input_ids"].shape[1] :]


def check(net, handle, batch, personas, **more):
    processor = pf.MPGLogitsProcessor(handle, personas, **batch, **more)
    found = stock(net, processor, batch)
    assert torch.equal(found, speak(net, handle, batch, personas, **more))
    return processor


@pytest.mark.parametrize("settings", [{}, {"min_p": 0.0}, {"min_p": 0.3, "policy_temperature": 0.6}], ids=str)
@pytest.mark.parametrize("kind", PERSONAS)
def test_greedy_tokens_are_those_of_our_loop(net, kind, settings):
    batch, persona = chats(), PERSONAS[kind]
    with voices.attach(net) as handle:
        processor = check(net, handle, batch, persona, **settings)
        assert not torch.equal(stock(net, processor, batch), speak(net, handle, batch, None))
        assert processor.stats.forwards > 0 and processor.stats.weight_bytes > 0


@pytest.mark.parametrize("rule", ["linear", "harmonic", "jensen_shannon", "max", lambda r, w: r.mean(0)])
def test_rules_and_bases(net, rule):
    persona = pf.Persona(policies={"formal": 0.6, "stern": 0.4}, aggregator=rule)
    with voices.attach(net) as handle:
        check(net, handle, chats(), persona)
        check(net, handle, chats(), pf.Persona(policies={"formal": 0.6}, aggregator=rule, base="jolly"))


def test_rows_may_have_their_own_personas_vectors_and_masks(net):
    batch = chats("what is this", "sea", "law", "is this law a ship ,", "yes")
    rows = [
        PERSONAS["mixed"],
        None,
        pf.Persona(vectors={"creative": 1.0}, mask="introvert", policies={"warm": 0.7}),
        pf.Persona(vectors={"futurist": 2.0}),
        PERSONAS["separate"],
    ]
    with voices.attach(net, masks=True) as handle:
        check(net, handle, batch, rows)


def test_rows_padded_at_the_left_are_what_they_are_alone(net):
    batch, persona = chats(), PERSONAS["separate"]
    assert not bool(batch["attention_mask"].all())
    with voices.attach(net) as handle:
        together = stock(net, pf.MPGLogitsProcessor(handle, persona, **batch), batch)
        for row in range(3):
            one = row_of(batch, row)
            assert torch.equal(stock(net, pf.MPGLogitsProcessor(handle, persona, **one), one)[0], together[row])
            assert torch.equal(speak(net, handle, one, persona)[0], together[row])


@pytest.fixture
def peft_model():
    """A PEFT model whose active adapter is one of the policies."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]), "live")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if ".lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped.eval()


def test_a_peft_model_with_an_active_adapter(peft_model):
    """Stock's own pass has the adapter on; the ratios are still to the model without any."""
    net, batch = peft_model, chats()
    plain = net.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, -NEW:]
    given = pf.PolicySet.from_adapters(net) | pf.PolicySet.from_models(net, {"stern": voices.apart(tiny.model(), 21)})
    with pf.attach(net, policies=given, tokenizer=tiny.tokenizer()) as handle:
        for rows in (
            pf.Persona(policies={"live": 0.5, "stern": 0.8}),
            [pf.Persona(policies={"live": 0.6}), None, None],
        ):
            check(net, handle, batch, rows)
    after = net.generate(**batch, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, -NEW:]
    assert torch.equal(plain, after)


@pytest.mark.parametrize("kind", ["lora", "separate", "prompts"])
def test_beams_follow_their_texts(net, kind):
    """Beam search by hand over our loop's own targets: the sums of log-probabilities are those of the sequences."""
    batch, persona, beams = chats("what is this", "sea"), PERSONAS[kind], 3
    with voices.attach(net) as handle:
        processor = pf.MPGLogitsProcessor(handle, persona, **batch)
        out = net.generate(
            **batch,
            logits_processor=LogitsProcessorList([processor]),
            num_beams=beams,
            max_new_tokens=4,
            length_penalty=0.0,
            pad_token_id=0,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        found = out.sequences[:, batch["input_ids"].shape[1] :]
        for row in range(2):
            total, text = 0.0, row_of(batch, row)
            for token in found[row].tolist():
                fresh = pf.MPGLogitsProcessor(handle, persona, **text)
                with torch.no_grad():
                    law = fresh(text["input_ids"], net(**text).logits[:, -1])
                total += float(law.log_softmax(-1)[0, token])
                ids = torch.cat([text["input_ids"], torch.tensor([[token]])], dim=1)
                text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            assert float(out.sequences_scores[row]) == pytest.approx(total, abs=1e-3)
        one = stock(net, pf.MPGLogitsProcessor(handle, persona, **batch), batch, max_new_tokens=4)
    assert found.shape == one.shape


def test_warpers_act_on_the_target(net):
    """With top_k = 1 sampling is greedy; and a token that is banned is not spoken."""
    batch, persona = chats(), PERSONAS["mixed"]
    with voices.attach(net) as handle:
        greedy = speak(net, handle, batch, persona)

        def made():
            return pf.MPGLogitsProcessor(handle, persona, **batch)

        assert torch.equal(stock(net, made(), batch, do_sample=True, top_k=1, temperature=0.7), greedy)
        assert torch.equal(stock(net, made(), batch, do_sample=True, top_k=0, top_p=1e-6), greedy)
        torch.manual_seed(0)
        drawn = stock(net, made(), batch, do_sample=True, top_k=0, top_p=0.95, num_return_sequences=2)
        assert drawn.shape == (6, NEW) and not torch.equal(drawn[0], drawn[1])


def test_one_made_for_another_batch_is_refused(net):
    batch = chats()
    with voices.attach(net) as handle:
        processor = pf.MPGLogitsProcessor(handle, PERSONAS["lora"], **batch)
        for other in (chats("sea", "law"), chats("sea", "yes", "law")):
            with pytest.raises(pf.PersonafastError, match="the processor was made for 3 rows of"):
                stock(net, processor, other)
        with pytest.raises(pf.PersonafastError, match="2 given for 3 rows"):
            pf.MPGLogitsProcessor(handle, [None, None], **batch)
        # A second call with the same batch is one of those it was made for.
        assert torch.equal(stock(net, processor, batch), stock(net, processor, batch))
    with pytest.raises(pf.PersonafastError, match="detached"):
        stock(net, processor, batch)


def test_a_text_that_is_read_anew_keeps_the_end_of_its_prompt(net):
    """After beams are reordered policies read prompt and text at once; steering by position must not notice."""
    batch = chats()
    persona = pf.Persona(
        policies={"formal": 0.7},
        steering=[
            pf.Steering({"creative": 3.0}, positions="last"),
            pf.Steering({"futurist": 2.0}, schedule="linear:3"),
        ],
    )
    text = torch.randint(3, tiny.VOCAB, (3, 3), generator=torch.Generator().manual_seed(5))
    with voices.attach(net) as handle:
        grown, anew = (pf.MPGLogitsProcessor(handle, persona, **batch, min_p=0.0) for _ in range(2))
        for length in range(4):
            ids = torch.cat([batch["input_ids"], text[:, :length]], dim=1)
            scores = grown(ids, torch.zeros(3, tiny.VOCAB))
        torch.testing.assert_close(anew(ids, torch.zeros(3, tiny.VOCAB)), scores, atol=1e-4, rtol=1e-4)
