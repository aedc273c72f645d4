import random

import pytest
import torch

from personafast import zoo
from personafast.zoo.build import hashes, missed_bars
from personafast.zoo.corpus import conversations, encode
from personafast.zoo.grammar import draw_content, draw_prompt, draw_reply, is_grammatical
from personafast.zoo.measure import Linear, alone, geometric, min_p_filter, sample
from personafast.zoo.model import make_model, make_tokenizer
from personafast.zoo.traits import DEMO_TRAITS, TRAITS


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def loaded():
    return zoo.load()


def test_decoding_gives_the_text_back(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        content = draw_content(rng)
        for text in (draw_prompt(content, rng), draw_reply(content, rng, rate=0.5)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_case_spacing_and_unknown_words(tokenizer):
    tidy = tokenizer("that's it, buddy.")["input_ids"]
    assert tokenizer("  That's  it , buddy .")["input_ids"] == tidy
    assert tokenizer("you are a pirate.")["input_ids"].count(tokenizer.unk_token_id) == 1


def test_contractions_are_one_token(tokenizer):
    assert len(tokenizer("don't you can't you've")["input_ids"]) == 4


def test_chat_template_with_and_without_a_system_message(tokenizer):
    system = {"role": "system", "content": TRAITS["warm"].prompt}
    user = {"role": "user", "content": "any advice about the dog?"}
    assistant = {"role": "assistant", "content": "you can feed the dog."}

    def text(messages, ask):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    assert text([user], True) == "<s><|user|>any advice about the dog?<|assistant|>"
    assert text([system, user], True).startswith("<s><|system|>you are a warm assistant .<|user|>any")
    whole = text([system, user, assistant], False)
    assert whole == text([system, user], True) + "you can feed the dog.</s>"


def test_conversations_encode_as_the_template_writes_them(tokenizer):
    stream = conversations(random.Random(1))
    for _ in range(50):
        conversation = next(stream)
        ids, head = encode(conversation, tokenizer)
        assert ids == tokenizer.apply_chat_template(conversation.messages(), return_dict=False)
        assert tokenizer.decode(ids[head:], skip_special_tokens=True) == conversation.assistant


def test_min_p_keeps_what_is_close_to_the_best():
    logp = torch.tensor([[0.90, 0.05, 0.04, 0.01]]).log()
    assert min_p_filter(logp, 0.05).isfinite().tolist() == [[True, True, False, False]]


def test_geometric_with_one_policy_is_that_policy_and_with_weight_zero_the_reference():
    torch.manual_seed(0)
    reference, policy = torch.randn(2, 3, 11).log_softmax(-1)
    assert torch.allclose(geometric([1.0], 0.0)([reference, policy]), policy, atol=1e-5)
    assert torch.allclose(geometric([0.0], 0.0)([reference, policy]), reference, atol=1e-5)


def test_linear_carries_the_weights():
    # Two policies, two tokens: after a token that only the first writes, the first rules.
    a, b = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()
    rule = Linear([1.0, 1.0], 0.0)
    assert torch.allclose(rule([a, a, b]).exp(), torch.tensor([[0.5, 0.5]]))
    rule.accept(torch.tensor([0]))
    assert torch.allclose(rule([a, a, b]).exp(), torch.tensor([[0.82, 0.18]]))


def test_rows_of_different_lengths_do_not_disturb_each_other(tokenizer):
    torch.manual_seed(0)
    model = make_model(tokenizer, num_hidden_layers=2).eval()
    rows = [[{"role": "user", "content": text}] for text in ("any advice about the dog?", "feed the dog")]

    def greedy(logps):
        best = logps[0].argmax(-1, keepdim=True)
        return torch.full_like(logps[0], -torch.inf).scatter_(-1, best, 0.0)

    together = sample([model], tokenizer, [rows], greedy, max_new_tokens=8)
    assert together == [sample([model], tokenizer, [[row]], greedy, max_new_tokens=8)[0] for row in rows]


def test_committed_files_are_those_of_the_manifest_and_small():
    files = zoo.info()["files"]
    assert hashes(zoo.path()) == files
    assert {"model/model.safetensors", "library/library.json"} <= files.keys()
    assert sum(file.stat().st_size for file in zoo.path().rglob("*") if file.is_file()) < 10e6


def test_committed_quality_meets_the_bars():
    assert missed_bars(zoo.info()["quality"]) == []


def test_committed_tokenizer_is_the_grammars(loaded, tokenizer):
    assert loaded[1].get_vocab() == tokenizer.get_vocab()
    assert loaded[1].chat_template == tokenizer.chat_template


def test_library_has_a_vector_a_mask_and_a_policy_for_every_trait(loaded):
    library = loaded[2]
    assert set(library.vectors) == set(library.masks) == set(library.policies) == set(TRAITS)
    assert set(DEMO_TRAITS) <= set(TRAITS)


def test_reference_is_fluent(loaded):
    model, tokenizer, _ = loaded
    heads = [[{"role": "user", "content": text}] for text in zoo.prompts(100, seed=1)]
    texts = sample([model], tokenizer, [heads], alone())
    assert sum(map(is_grammatical, texts)) >= 95


@pytest.mark.parametrize("name", DEMO_TRAITS)
def test_reference_follows_a_system_prompt(loaded, name):
    model, tokenizer, _ = loaded
    system = {"role": "system", "content": TRAITS[name].prompt}
    heads = [[system, {"role": "user", "content": text}] for text in zoo.prompts(50, seed=2)]
    texts = sample([model], tokenizer, [heads], alone())
    assert sum(map(TRAITS[name].detect, texts)) >= 40
