"""Scored texts have the log-probabilities of a softmax over the model's logits, whoever speaks and however padded."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.evaluate.logprobs import Continuation, TextScorer

TEXTS = [
    Continuation(list(range(3, 12)), 4),
    Continuation([5, 9], 1),
    Continuation(list(range(30, 45)), 14),
    Continuation(list(range(20, 24)), 2),
]


def by_hand(net, text):
    with torch.no_grad():
        logp = net(torch.tensor([text.ids])).logits[0].double().log_softmax(-1)
    start = len(text.ids) - text.scored
    return torch.stack([logp[place - 1, text.ids[place]] for place in range(start, len(text.ids))]).float()


def cohere(**more):
    import transformers as t

    torch.manual_seed(0)
    config = t.CohereConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        logit_scale=0.25, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return t.CohereForCausalLM(config).eval()


def granite():
    import transformers as t

    torch.manual_seed(0)
    config = t.GraniteConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return t.GraniteForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_values_and_order_are_those_of_single_texts(family):
    net = {"cohere": cohere, "granite": granite}.get(family, lambda: tiny.model(family))()
    scorer = TextScorer(net)
    found = scorer.score(TEXTS, batch_size=3)
    # The scale and the soft cap of the logits were understood: nothing of the size of the vocabulary is stored.
    assert scorer._form is not None and (family != "gemma2" or scorer._form[1] > 0)
    for text, values in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(values, by_hand(net, text), rtol=1e-4, atol=1e-4)


def test_the_head_runs_for_the_trial_only():
    net = tiny.model()
    scorer, calls = TextScorer(net), []
    net.lm_head.register_forward_hook(lambda *_: calls.append(1))
    scorer.score(TEXTS)
    scorer.score(TEXTS)
    assert len(calls) == 1
    assert not net.lm_head._forward_pre_hooks


def test_logits_that_no_scale_explains_are_made():
    net = tiny.model()
    plain = net.forward

    def odd(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 3, tiny.VOCAB)
        return out

    net.forward = odd
    scorer = TextScorer(net)
    found = scorer.score(TEXTS)
    assert scorer._form is None
    for text, values in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(values, by_hand(net, text), rtol=1e-4, atol=1e-4)


def test_whoever_is_in_force_speaks(library):
    net = tiny.model()
    before = TextScorer(net).score(TEXTS)
    with pf.attach(net, library) as personas:
        with personas.using([pf.Persona(vectors={"creative": 5.0})]):
            steered = TextScorer(net).score(TEXTS)
            wanted = [by_hand(net, text) for text in TEXTS]
        after = TextScorer(net).score(TEXTS)
    for plain, one, hand, again in zip(before, steered, wanted, after, strict=True):
        torch.testing.assert_close(one, hand, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-4)
        assert (one - plain).abs().max() > 0.05


@pytest.mark.parametrize(("ids", "scored"), [([5, 6], 2), ([5, 6], 0), ([5], 1)])
def test_a_text_without_a_token_before_its_continuation_is_refused(ids, scored):
    with pytest.raises(pf.PersonafastError, match=r"texts\[1\]"):
        TextScorer(tiny.model()).score([TEXTS[0], Continuation(ids, scored)])


def test_a_text_beyond_the_learned_positions_is_refused():
    with pytest.raises(pf.PersonafastError, match=r"texts\[0\]: 65 tokens, and the model has 64 positions"):
        TextScorer(tiny.model("gpt2")).score([Continuation([5] * 65, 3)])
