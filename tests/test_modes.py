"""Steering under every way of generating, against the same call with vectors added by plain hooks."""

import copy

import pytest
import torch
from helpers import tiny
from helpers.hooks import adding, by_blocks

import personafast as pf

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
NEW = 8
BLEND = {"creative": 2.0, "futurist": 0.5}
OTHER = {"futurist": 1.5}
PERSONAS = [pf.Persona(vectors=BLEND), None, pf.Persona(vectors=OTHER)]


@pytest.fixture
def rows(library):
    return [by_blocks(library, BLEND), None, by_blocks(library, OTHER)]


def padded(side):
    ids = torch.randint(3, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, count in ((1, 3), (2, 1)):
        mask[row, slice(count) if side == "left" else slice(-count, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def text(net, batch, **options):
    torch.manual_seed(11)
    return net.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **options})


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams, several sequences": {"num_beams": 3, "num_return_sequences": 2},
    "beams, sampling": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
def test_stock_generate_inside_using(net, library, rows, mode, side):
    batch, options = padded(side), MODES[mode]
    plain = text(net, batch, **options)
    with adding(net, rows):
        hand = text(net, batch, **options)
    with pf.attach(net, library) as personas:
        nobody = text(net, batch, **options)
        with personas.using(PERSONAS):
            found = text(net, batch, **options)
    assert torch.equal(found, hand) and torch.equal(nobody, plain)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "auto"])
def test_our_own_generate_writes_the_greedy_text_of_a_row_by_hand(net, library, rows, sampler, side):
    batch = padded(side)
    hand = []
    for row, vectors in enumerate(rows):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        with adding(net, [vectors]):
            hand.append(text(net, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0, -NEW:])
    with pf.attach(net, library) as personas:
        found = text(net, batch, custom_generate=personas.generate, personas=PERSONAS, sampler=sampler)
    assert torch.equal(found[:, -NEW:], torch.stack(hand))


@pytest.mark.parametrize("helper", ["prompt lookup", "a model"])
def test_assisted_decoding(net, library, rows, helper):
    ids = torch.tensor([[5, 9, 5, 9, 5, 9, 5]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assistant = {"assistant_model": tiny.model(seed=1)} if helper == "a model" else {"prompt_lookup_num_tokens": 3}
    with adding(net, rows[:1]):
        hand, alone = text(net, batch, **assistant), text(net, batch)
    with pf.attach(net, library) as personas, personas.using(PERSONAS[:1]):
        found = text(net, batch, **assistant)
    assert torch.equal(found, hand) and torch.equal(found, alone)


@torch.no_grad()
def test_a_cache_is_continued_by_hand(net, library, rows):
    from transformers import DynamicCache

    batch = padded("left")
    more = torch.randint(3, tiny.VOCAB, (3, 4), generator=torch.Generator().manual_seed(4))
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)

    def two_turns():
        cache = DynamicCache(config=net.config)
        first = net(**batch, past_key_values=cache).logits
        second = net(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        whole = torch.cat([batch["input_ids"], more], dim=1)
        return first, second, text(net, {"input_ids": whole, "attention_mask": mask}, past_key_values=cache)

    with adding(net, rows):
        hand = two_turns()
    with pf.attach(net, library) as personas, personas.using(PERSONAS):
        found = two_turns()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, hand, strict=True))


@pytest.mark.parametrize("active", [True, False], ids=["adapter on", "adapter off"])
def test_a_peft_model(net, library, rows, active):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    if not active:
        wrapped.disable_adapter_layers()
    wrapped.eval()
    batch = padded("left")
    plain = text(wrapped, batch)
    with adding(wrapped, rows):
        hand = text(wrapped, batch)
    for owner in (wrapped, net):
        with pf.attach(owner, library) as personas:
            nobody = text(wrapped, batch)
            with personas.using(PERSONAS):
                found = text(wrapped, batch)
        assert torch.equal(found, hand) and torch.equal(nobody, plain) and not torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_model_that_changes_its_dtype_while_attached(net, library, rows, dtype):
    batch = padded("left")
    with pf.attach(net, library) as personas:
        with personas.using(PERSONAS):
            net(**batch)
            net.to(dtype)
            found = net(**batch).logits
    wide = [row and {block: vector.to(torch.float32) for block, vector in row.items()} for row in rows]
    with adding(net, [row and {b: v.to(dtype) for b, v in row.items()} for row in wide]):
        hand = net(**batch).logits
    assert found.dtype == dtype
    torch.testing.assert_close(found, hand, rtol=0.05, atol=0.3 if dtype == torch.bfloat16 else 1e-6)


def test_a_copy_of_an_attached_model_is_steered_on_its_own(net, library, rows):
    batch = padded("left")
    with adding(net, rows):
        hand = text(net, batch)
    plain = text(net, batch)
    with pf.attach(net, library) as personas:
        with personas.using(PERSONAS):
            text(net, batch)
        twin = copy.deepcopy(net)
        with personas.using(PERSONAS):
            assert torch.equal(text(twin, batch), plain)
            assert torch.equal(text(net, batch), hand)
        with torch.no_grad(), adding(net, rows):
            logits = net(**batch).logits
        with torch.no_grad():
            steered = twin(**batch, personas=PERSONAS).logits
        # The vector is added to a copy of the weights, the hooks by hand to the model itself.
        assert torch.equal(steered, logits)
    assert torch.equal(text(net, batch), plain)


def test_attaching_twice_is_refused(net, library):
    with pf.attach(net, library), pytest.raises(pf.PersonafastError, match="attached already"):
        pf.attach(net, library)
    pf.attach(net, library).detach()


def test_what_is_saved_while_attached_is_the_model(net, library, tmp_path):
    from transformers import AutoModelForCausalLM

    batch = padded("left")
    plain = text(net, batch)
    net.save_pretrained(tmp_path / "before")
    with pf.attach(net, library) as personas, personas.using(PERSONAS):
        net.save_pretrained(tmp_path / "attached")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "attached", dtype=torch.float32)
    assert torch.equal(text(again, batch), plain)
