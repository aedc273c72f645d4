"""What a row carries stays with that row: repeated rows, slots used again, blocks that hand on their input, masks."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from helpers import tiny

import personafast as pf
from personafast.errors import UnsupportedModelError
from personafast.masks import PersonaMask
from personafast.models.anatomy import anatomy
from personafast.models.banks import VectorBank

pytestmark = pytest.mark.usefixtures("reference_backend")
STEERED = pf.Persona(vectors={"creative": 2.0})


@pytest.fixture
def ids():
    return torch.randint(3, tiny.VOCAB, (2, 5), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_a_batch_that_is_a_multiple_repeats_each_row_in_place(net, library, ids):
    four = ids.repeat_interleave(2, dim=0)
    with pf.attach(net, library) as handle:
        plain, steered = net(four).logits, net(four, personas=[STEERED] * 4).logits
        with handle.using([STEERED, None]):
            found = net(four).logits
    assert torch.equal(found[:2], steered[:2]) and torch.equal(found[2:], plain[2:])
    assert not torch.equal(steered, plain)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_of_stock_generate_carry_the_persona_of_their_row(net, library, ids, more):
    personas = [STEERED, pf.Persona(mask="introvert")]
    options = {"max_new_tokens": 6, "do_sample": False, **more}
    with pf.attach(net, library) as handle:
        with handle.using(personas):
            together = net.generate(ids, attention_mask=torch.ones_like(ids), **options)
        alone = []
        for row, persona in enumerate(personas):
            one = ids[row : row + 1]
            with handle.using([persona]):
                alone.append(net.generate(one, attention_mask=torch.ones_like(one), **options))
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("hand_on", [lambda x: x, lambda x: x.view(x.shape)], ids=["the input", "a view of it"])
def test_a_block_that_hands_its_input_on_does_not_get_it_edited(net, library, ids, hand_on):
    seen = {}
    with pf.attach(net, library):
        block = net.model.layers[1]
        block.forward = lambda hidden, **_: hand_on(hidden)
        net.model.layers[0].register_forward_hook(lambda _, __, output: seen.update(before=output, was=output.clone()))
        block.register_forward_hook(lambda _, __, output: seen.update(after=output))
        net(ids, personas=[pf.Persona(vectors={"creative": 2.0}, blocks=(1,)), None])
        del block.forward
    assert torch.equal(seen["before"], seen["was"])
    expected = seen["was"].clone()
    expected[0] += 2.0 * library.vectors["creative"].directions[1]
    torch.testing.assert_close(seen["after"], expected)


@torch.no_grad()
def test_a_slot_used_again_keeps_nothing_of_the_blend_before(net, library, ids):
    both = pf.Persona(vectors={"creative": 2.0}, blocks=(0, 1))
    fewer = pf.Persona(vectors={"futurist": 1.0}, blocks=(1,))
    with pf.attach(net, library):
        expected = net(ids, personas=[fewer, None]).logits
    with pf.attach(net, library, max_personas=1):
        net(ids, personas=[both, None])
        found = net(ids, personas=[fewer, None]).logits
    assert torch.equal(found, expected)


def test_the_blend_used_longest_ago_leaves_a_full_bank(net):
    bank = VectorBank(anatomy(net), 3)

    def lease(key):
        return bank.known(key) or bank.put(key, torch.ones(tiny.BLOCKS, tiny.HIDDEN))

    first = {key: lease(key).slot for key in "abc"}
    assert len(set(first.values())) == 3 and not bank.in_use
    assert lease("a").slot == first["a"]
    assert lease("d").slot == first["b"]  # not a's, although that was filled first
    assert lease("a").slot == first["a"] and bank.known("b") is None
    # What somebody holds stays, whatever its age, and goes when the last one lets go.
    held = [lease("c"), lease("c")]
    lease("a"), lease("d")
    assert bank.in_use == {first["c"]} and lease("e").slot == first["a"]
    held.pop()
    assert lease("f").slot == first["b"] and lease("c").slot == first["c"]
    held.clear()
    assert not bank.in_use


def test_linears_that_a_mask_does_not_name_stay_dense_beside_a_mask_that_does(net, ids):
    whole = tiny.library(net).masks["introvert"]
    paths = sorted(whole.words)
    parts = {"attention": [path for path in paths if "self_attn" in path]}
    parts["feedforward"] = [path for path in paths if path not in parts["attention"]]
    library = pf.PersonaLibrary(anatomy(net).shape)
    expected = []
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    for row, (name, own) in enumerate(parts.items()):
        assert own
        mask = PersonaMask({path: whole.words[path] for path in own}, {path: whole.in_features[path] for path in own})
        library.add_mask(name, mask)
        masked = copy.deepcopy(net)
        with torch.no_grad():
            for path in own:
                masked.get_submodule(path).weight.mul_(mask.dense(path))
        expected.append(masked.generate(ids, **options)[row])
    with pf.attach(net, library) as handle:
        found = net.generate(
            ids, custom_generate=handle.generate, personas=[pf.Persona(mask=name) for name in parts], **options
        )
    assert torch.equal(found, torch.stack(expected))


@torch.no_grad()
@pytest.mark.parametrize("how", ["prune", "weight_norm"])
def test_a_weight_made_of_other_parameters_is_read_as_it_is_made(net, ids, how):
    layer = net.model.layers[0].mlp.up_proj
    if how == "prune":
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3)
    else:
        torch.nn.utils.parametrizations.weight_norm(layer)
    before = net(ids).logits
    with pf.attach(net, tiny.library(net)):
        assert torch.equal(net(ids).logits, before)
    with pytest.raises(UnsupportedModelError, match="keep_dense: the weight of .* is computed from other parameters"):
        pf.attach(net, tiny.library(net), keep_dense=False)
    assert torch.equal(net(ids).logits, before)


@torch.no_grad()
def test_a_linear_takes_its_input_by_name(net, library):
    x = torch.randn(1, tiny.HIDDEN)
    expected = net.lm_head(x)
    with pf.attach(net, library):
        assert torch.equal(net.lm_head(input=x), expected)
        assert net.model.layers[0].mlp.up_proj(input=x).shape == (1, 64)


@torch.no_grad()
def test_a_forward_that_somebody_else_put_over_ours_outlives_detach(net, library, ids):
    layer, before = net.model.layers[0].mlp.up_proj, net(ids).logits
    handle = pf.attach(net, library)
    inner, seen = layer.forward, []
    layer.forward = lambda x: (seen.append(1), inner(x))[1]
    del net.lm_head.forward
    handle.detach()
    assert torch.equal(net(ids).logits, before) and seen == [1]


@torch.no_grad()
def test_weights_that_are_not_in_memory_are_refused(net, library, ids):
    weight = net.model.layers[0].mlp.up_proj.weight
    net.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to("meta"))
    for keep_dense in (True, False):
        with pytest.raises(UnsupportedModelError, match=r"up_proj is not in memory"):
            pf.attach(net, library, keep_dense=keep_dense)
    net.to("meta")
    library._masks.clear()
    with pytest.raises(UnsupportedModelError, match=r"no weight of LlamaForCausalLM is in memory"):
        pf.attach(net, library)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_bank_made_in_inference_mode_serves_outside_it(net, library, ids, first):
    with pf.attach(net, library):
        with first():
            expected = net(ids, personas=[STEERED, None]).logits
        with torch.no_grad():
            net(ids, personas=[pf.Persona(vectors={"creative": 1.0}), STEERED])
        logits = net(ids, personas=[STEERED, None]).logits
        assert torch.equal(logits, expected)
        logits.sum().backward()
