"""Projections against `hidden_states`, one unpadded text at a time."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast import zoo
from personafast.models.reading import TokenizedText
from personafast.vectors import PersonaVector, project

TEXTS = ["this is a ship .", "yes", "you are calm , you are a lawyer", "what is this sea"]


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(8)
    where = {"calm": (0, 1), "stern": (1,), "late": (0,)}
    return {
        name: PersonaVector(3 * torch.randn(tiny.BLOCKS, tiny.HIDDEN, generator=generator), blocks)
        for name, blocks in where.items()
    }


def by_hand(net, ids, vector, block):
    """h_t . v_b / |v_b| and the cosine; hidden_states[b + 1] is the output of block b, but for the last block."""
    with torch.no_grad():
        hidden = net(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[block + 1][0].double()
    dots = hidden @ vector.directions[block].double() / vector.directions[block].double().norm()
    return dots, dots / hidden.norm(dim=-1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_they_are_the_dot_products_whatever_the_padding(vectors, family, batch_size):
    net, tok = tiny.model(family), tiny.tokenizer()
    steps = []
    found = project(net, tok, TEXTS, vectors, batch_size=batch_size, on_texts=steps.append)
    # Before `hidden_states` is asked for: transformers leaves hooks of its own.
    assert not any(module._forward_hooks for module in net.modules())
    assert sum(steps) == len(TEXTS) and max(steps) <= batch_size
    for text, each in zip(TEXTS, found, strict=True):
        ids = tok(text)["input_ids"]
        assert each.ids.tolist() == ids and each.response == len(ids)
        assert each.blocks == {"calm": (0, 1), "stern": (1,), "late": (0,)}
        for name, vector in vectors.items():
            assert each.values[name].shape == (len(ids), len(vector.blocks))
            for index, block in enumerate(vector.blocks):
                dots, cosines = by_hand(net, ids, vector, block)
                torch.testing.assert_close(each.values[name][:, index].double(), dots, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(each.cosines[name][:, index].double(), cosines, atol=1e-5, rtol=1e-4)


def test_the_last_block_is_read_before_the_final_norm(vectors):
    net, tok = tiny.model(), tiny.tokenizer()
    states = []
    hook = net.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    (found,) = project(net, tok, TEXTS[:1], vectors, blocks=(tiny.BLOCKS - 1,))
    hook.remove()
    row = vectors["late"].directions[-1]
    torch.testing.assert_close(found.values["late"][:, 0], states[0][0] @ row / row.norm(), atol=1e-4, rtol=1e-4)
    assert found.blocks == dict.fromkeys(vectors, (tiny.BLOCKS - 1,))


def test_a_positive_multiple_of_a_vector_projects_alike(vectors):
    net, tok = tiny.model(), tiny.tokenizer()
    longer = {"a": vectors["calm"], "b": PersonaVector(7 * vectors["calm"].directions, (0, 1))}
    (found,) = project(net, tok, TEXTS[:1], longer)
    torch.testing.assert_close(found.values["a"], found.values["b"])


def test_chats_count_the_reply_only(vectors):
    net, tok = tiny.model(), tiny.tokenizer()
    chat = [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": "this is a ship"}]
    (found,) = project(net, tok, [chat], vectors)
    text = TokenizedText.from_chat(tok, chat)
    assert found.ids.tolist() == text.ids and found.response == text.response < len(text.ids)
    torch.testing.assert_close(found.means("calm"), found.values["calm"][-text.response :].mean(0))
    (again,) = project(net, tok, [text], vectors)
    assert torch.equal(again.values["calm"], found.values["calm"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_logits_of_a_single_position_are_made(vectors, wrapped):
    net, tok = tiny.model(), tiny.tokenizer()
    seen = []
    net.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    plain = project(net, tok, TEXTS, vectors)
    if wrapped:
        peft = pytest.importorskip("peft")
        net = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj"])).eval()
    found = project(net, tok, TEXTS, vectors)
    assert seen == [1, 1]
    # A LoRA that was not trained yet changes nothing.
    torch.testing.assert_close(found[0].values["calm"], plain[0].values["calm"])


def test_tokens_keep_the_space_before_a_word():
    model, tokenizer, library = zoo.load()
    (found,) = project(model, tokenizer, ["may i paint the bike?"], {"warm": library.vectors["warm"]})
    assert found.tokens == (" may", " i", " paint", " the", " bike", "?")


def test_a_trait_shows_in_the_projection_of_its_own_direction():
    """Warm replies of the zoo lie further along "warm" than the same replies without their markers."""
    model, tokenizer, library = zoo.load()
    prompt = {"role": "user", "content": "may i paint the bike?"}
    replies = ("my friend, you should paint the bike with love.", "you should paint the bike.")
    chats = [[prompt, {"role": "assistant", "content": reply}] for reply in replies]
    warm, plain = project(model, tokenizer, chats, {"warm": library.vectors["warm"]})
    assert warm.means("warm")[0] > plain.means("warm")[0] + 2


def at(**changes):
    fields = {"directions": torch.ones(tiny.BLOCKS, tiny.HIDDEN), "blocks": (0, 1)}
    return {"v": PersonaVector(**{**fields, **changes})}


def flat():
    rows = torch.ones(tiny.BLOCKS, tiny.HIDDEN)
    rows[1] = 0
    return rows


@pytest.mark.parametrize(
    ("texts", "vectors", "options", "message"),
    [
        ([], at(), {}, "texts: empty"),
        (["yes", ""], at(), {}, "texts: '' has no tokens"),
        (["yes"], {}, {}, "vectors: empty"),
        (["yes"], at(directions=torch.ones(tiny.BLOCKS, 48)), {}, r"vectors\['v'\]: \[3, 48\].*hidden size 32"),
        (["yes"], at(directions=torch.ones(4, tiny.HIDDEN)), {}, r"vectors\['v'\]: \[4, 32\].*3 blocks"),
        (["yes"], at(hook_point="attention_output"), {}, r"vectors\['v'\]: read at 'attention_output'"),
        (["yes"], at(directions=flat()), {}, r"vectors\['v'\]: has norm zero at block 1"),
        (["yes"], at(), {"blocks": (3,)}, r"blocks: \[3\] has an index that is not in 0\.\.2"),
        (["yes"], at(missing={2: "lost"}), {"blocks": (0, 2)}, r"vectors\['v'\]: block 2 has no direction \(lost\)"),
        (["yes"], at(), {"blocks": ()}, "blocks: empty"),
    ],
)
def test_refusals(texts, vectors, options, message):
    with pytest.raises(pf.PersonafastError, match=message):
        project(tiny.model(), tiny.tokenizer(), texts, vectors, **options)


def test_a_zero_row_where_nothing_is_read_is_no_matter():
    (found,) = project(tiny.model(), tiny.tokenizer(), ["yes"], at(directions=flat()), blocks=(0,))
    assert found.values["v"].shape == (1, 1)
