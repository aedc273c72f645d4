import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.models.reading import TokenizedText
from personafast.vectors import Contrast, PersonaVector, blend, extract_vectors
from personafast.vectors.extract import mean_activations

CHATS = [
    [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": text}]
    for text in ("this is a ship .", "yes", "you are calm , you are a lawyer")
]


def by_hand(net, texts):
    """Mean over texts of the mean over response tokens of `hidden_states`, one text at a time, without padding."""
    total = 0
    for text in texts:
        with torch.no_grad():
            states = net(torch.tensor([text.ids]), output_hidden_states=True).hidden_states
        # hidden_states[b + 1] is the output of block b, but the last one is after the final norm.
        total = total + torch.stack([state[0, -text.response :].double().mean(0) for state in states[1:-1]])
    return total / len(texts)


def test_mean_activations_are_those_of_unpadded_texts():
    net, tok = tiny.model(), tiny.tokenizer()
    texts = [TokenizedText.from_chat(tok, chat) for chat in CHATS]
    assert len({len(text.ids) for text in texts}) == 3
    found = mean_activations(net, texts, batch_size=3)
    torch.testing.assert_close(found[:-1], by_hand(net, texts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, mean_activations(net, texts, batch_size=1), atol=1e-5, rtol=1e-5)


def test_extract_is_the_difference_of_means_and_leaves_no_hook():
    net, tok = tiny.model(), tiny.tokenizer()
    found = extract_vectors(net, tok, {"calm": Contrast(CHATS[2:], CHATS[:2])}, blocks=(1,))["calm"]
    assert not any(module._forward_hooks for module in net.modules())
    positive, negative = ([TokenizedText.from_chat(tok, chat) for chat in side] for side in (CHATS[2:], CHATS[:2]))
    expected = by_hand(net, positive) - by_hand(net, negative)
    torch.testing.assert_close(found.directions[:-1].double(), expected, atol=1e-5, rtol=1e-5)
    assert found.blocks == (1,) and found.directions.shape == (tiny.BLOCKS, tiny.HIDDEN)


def test_extraction_needs_both_sides():
    with pytest.raises(pf.PersonafastError, match="texts: empty"):
        extract_vectors(tiny.model(), tiny.tokenizer(), {"calm": Contrast([], CHATS)})
    with pytest.raises(pf.PersonafastError, match="last message must be the assistant"):
        TokenizedText.from_chat(tiny.tokenizer(), CHATS[0][:1])


def test_blend_is_the_weighted_sum_at_each_vectors_blocks():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    vectors = {"a": PersonaVector(a, (1, 2)), "b": PersonaVector(b, (2,))}
    found = blend(vectors, {"a": 2.0, "b": -0.5})
    expected = torch.zeros(4, 8)
    expected[1] = 2 * a[1]
    expected[2] = 2 * a[2] - 0.5 * b[2]
    torch.testing.assert_close(found, expected)
    chosen = blend(vectors, {"a": 1.0, "b": 1.0}, blocks=(0,))
    torch.testing.assert_close(chosen[0], a[0] + b[0])
    assert not chosen[1:].any()
    unit = blend(vectors, {"a": 3.0}, normalize="unit")
    assert unit[1].norm() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: blend(v, {"c": 1.0}), "no vector 'c'; there are a"),
        (lambda v: blend(v, {}), "coefficients: empty"),
        (lambda v: blend(v, {"a": 1.0}, blocks=(9,)), "not in 0..3"),
        (lambda v: blend(v, {"a": 1.0}, normalize="max"), "normalize"),
        (lambda v: blend({**v, "b": PersonaVector(torch.ones(4, 9))}, {"a": 1.0, "b": 1.0}), "does not fit"),
        (lambda v: PersonaVector(torch.ones(3)), "num_blocks, hidden"),
        (lambda v: PersonaVector(torch.ones(3, 2), (3,)), "block 3 is not in 0..2"),
    ],
)
def test_bad_blends_are_refused(call, message):
    with pytest.raises(pf.PersonafastError, match=message):
        call({"a": PersonaVector(torch.ones(4, 8))})


def test_vectors_of_two_hook_points_do_not_blend():
    ours, other = PersonaVector(torch.ones(4, 8)), PersonaVector(torch.ones(4, 8), hook_point="attention_output")
    with pytest.raises(
        pf.PersonafastError, match=r"vectors\['b'\]: read at 'attention_output', others .* 'block_output'"
    ):
        blend({"a": ours, "b": other}, {"a": 1.0, "b": 1.0})
    with pytest.raises(pf.PersonafastError, match="hook_point '' is not a name"):
        PersonaVector(torch.ones(4, 8), hook_point="")
