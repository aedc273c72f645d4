"""Where a system text goes in a row of token ids."""

import pytest
from helpers import tiny

from personafast.density.prompting import SystemPrompts

TEXT = "you are a pirate"


@pytest.fixture
def without_template():
    tok = tiny.tokenizer()
    tok.chat_template = None
    return tok


def test_without_a_chat_template_the_text_stands_behind_the_bos_token(without_template):
    tok = without_template
    text, words = (tok(words, add_special_tokens=False)["input_ids"] for words in (TEXT, "what is this"))
    bos = tok.bos_token_id
    prompts = SystemPrompts(tok)
    assert prompts.insert([bos, *words], TEXT) == [bos, *text, *words]
    assert prompts.insert(words, TEXT) == [*text, *words]
    # Only the first token is a beginning.
    assert prompts.insert([*words, bos], TEXT) == [*text, *words, bos]


def test_a_tokenizer_that_knows_no_bos_token_puts_the_text_in_front(without_template):
    tok = without_template
    tok.bos_token = None
    text, words = (tok(words, add_special_tokens=False)["input_ids"] for words in (TEXT, "what is this"))
    assert SystemPrompts(tok).insert(words, TEXT) == [*text, *words]


def test_with_a_chat_template_the_row_is_what_the_template_renders():
    tok = tiny.tokenizer()
    user = {"role": "user", "content": "what is this"}
    plain, under = (
        tok.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        for chat in ([user], [{"role": "system", "content": TEXT}, user])
    )
    assert SystemPrompts(tok).insert(plain, TEXT) == list(under)
