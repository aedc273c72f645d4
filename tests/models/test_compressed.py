"""keep_dense=False: one mask's weights are the model, and everything says so."""

import copy

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.models import patch

MASKED = pf.Persona(mask="introvert")


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    with pf.ops.use_backend(request.param):
        yield


@pytest.fixture
def ids():
    return torch.randint(3, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))


def tokens(net, ids, **options):
    return net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options)


@torch.no_grad()
@pytest.mark.usefixtures("backend")
def test_it_computes_what_the_mask_over_the_dense_weights_does(net, library, ids):
    with pf.attach(net, library):
        expected = net(ids, personas=[MASKED] * 2).logits
    handle = pf.attach(net, library, keep_dense=False)
    torch.testing.assert_close(net(ids, personas=[MASKED] * 2).logits, expected, rtol=1e-4, atol=1e-4)
    # Without personas too: there is no other model any more.
    torch.testing.assert_close(net(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="dense weights were given up"):
        handle.detach()


@torch.no_grad()
@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize(
    "persona",
    [
        MASKED,
        pf.Persona(mask="introvert", vectors={"creative": 1.5}),
        pf.Persona(mask="introvert", policies={"formal": 0.7, "warm": 0.5}),
    ],
    ids=["mask", "and a vector", "and policies"],
)
def test_generate_speaks_as_it_does_with_the_dense_weights(library, ids, persona):
    texts = []
    for keep_dense in (True, False):
        net = tiny.model()
        handle = pf.attach(net, library, keep_dense=keep_dense)
        texts.append(tokens(net, ids, custom_generate=handle.generate, personas=persona))
    assert torch.equal(texts[0], texts[1])


def test_names_stay_and_the_weights_go(net, library):
    names, mask = list(net.state_dict()), library.masks["introvert"]
    before = sum(p.numel() * p.element_size() for p in net.parameters())
    pf.attach(net, library, keep_dense=False)
    assert list(net.state_dict()) == names
    gone = {path for path in mask.words if net.get_submodule(path).weight.is_meta}
    assert gone == set(mask.words)
    left = sum(p.numel() * p.element_size() for p in net.parameters() if not p.is_meta)
    compressed = [net.get_submodule(path).__dict__["_personafast_compressed"] for path in gone]
    kept = sum(t.numel() * t.element_size() for c in compressed for t in (c.values, c.bitmap))
    dense = sum(net.get_submodule(path).weight.numel() * 4 for path in gone)
    assert left == before - dense
    # fp32: 32 bits a kept weight and one a weight, rows rounded up to whole words.
    assert kept == pytest.approx(dense * (mask.kept + 1 / 32), rel=1e-6)


def test_rows_that_are_not_of_the_mask_are_refused(net, library, ids):
    handle = pf.attach(net, library, keep_dense=False)
    for personas in (None, [MASKED, None], pf.Persona(vectors={"creative": 1.0})):
        with pytest.raises(PersonafastError, match="does not speak through mask 'introvert'.*keep_dense=True"):
            tokens(net, ids, custom_generate=handle.generate, personas=personas)
    with pytest.raises(PersonafastError, match="does not speak through mask"), handle.using([None, MASKED]):
        pass


@pytest.mark.parametrize("masks", [0, 2])
def test_a_library_without_exactly_one_mask_is_refused_and_nothing_is_patched(net, ids, masks):
    library = tiny.library(net, masks=masks > 0)
    if masks == 2:
        library.add_mask("thinker", library.masks["introvert"])
    before = net(ids).logits
    with pytest.raises(PersonafastError, match=f"keep_dense: the library has {masks} masks"):
        pf.attach(net, library, keep_dense=False)
    assert torch.equal(net(ids).logits, before)
    pf.attach(net, library).detach()


@torch.no_grad()
def test_detach_warns_and_leaves_the_masked_weights(net, library, ids):
    mask = library.masks["introvert"]
    expected = copy.deepcopy(net)
    path = next(iter(mask.words))
    net.get_submodule(path).weight.requires_grad_(False)
    for name in mask.words:
        expected.get_submodule(name).weight.mul_(mask.dense(name))
    handle = pf.attach(net, library, keep_dense=False)
    with pytest.warns(UserWarning, match="keeps those of mask 'introvert' and zeros elsewhere"):
        handle.detach()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    assert torch.equal(net(ids).logits, expected(ids).logits)
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == [f"{path}.weight"]
    handle.detach()


@torch.no_grad()
def test_a_weight_that_another_module_needs_is_not_freed(net, library, ids):
    first, second = (layer.mlp.up_proj for layer in net.model.layers[:2])
    first.weight = second.weight
    before = net(ids).logits
    with pytest.raises(UnsupportedModelError, match=r"keep_dense: model\.layers\.\d\.mlp\.up_proj shares its weight"):
        pf.attach(net, library, keep_dense=False)
    assert not any(p.is_meta for p in net.parameters()) and torch.equal(net(ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("keep_dense", [True, False])
def test_a_deep_copy_of_an_attached_model_has_weights_of_its_own(net, library, ids, keep_dense):
    pf.attach(net, library, keep_dense=keep_dense)
    personas = [MASKED, pf.Persona(mask="introvert", vectors={"creative": 2.0})]
    before = net(ids, personas=personas).logits
    other = copy.deepcopy(net)
    assert torch.equal(other(ids, personas=personas).logits, before)
    for parameter in other.parameters():
        if not parameter.is_meta:
            parameter.mul_(0.5)
    for module in other.modules():
        if "_personafast_compressed" in module.__dict__:
            module.__dict__["_personafast_compressed"].values.mul_(0.5)
    assert not torch.equal(other(ids, personas=personas).logits, before)
    assert torch.equal(net(ids, personas=personas).logits, before)


@torch.no_grad()
def test_every_plain_linear_and_the_head_run_on_our_kernel(net, library, ids, monkeypatch):
    pytest.importorskip("personafast._C")
    seen = []
    linear = patch.ops.linear
    monkeypatch.setattr(patch.ops, "linear", lambda x, w, b=None: (seen.append(id(w)), linear(x, w, b))[1])
    with pf.attach(net, library):
        net(ids)
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(seen) == sorted(id(m.weight) for m in linears)
    seen.clear()
    net(ids)
    assert seen == []


@torch.no_grad()
def test_a_mask_put_in_the_place_of_the_one_that_was_kept_is_refused(net, library, ids):
    handle = pf.attach(net, library, keep_dense=False)
    mask = library.masks["introvert"]
    library.add_mask("other", mask)
    tokens(net, ids, custom_generate=handle.generate, personas=MASKED)
    library.add_mask("introvert", copy.deepcopy(mask))
    with pytest.raises(PersonafastError, match=r"masks\['introvert'\]: another mask now.*keep_dense=False"):
        net(ids, personas=[MASKED] * 2)


@pytest.mark.filterwarnings("ignore:detach")
def test_what_detach_puts_back_is_of_the_models_dtype_and_may_be_trained(net, library, ids):
    handle = pf.attach(net, library, keep_dense=False)
    net.to(torch.bfloat16)
    with torch.inference_mode():
        handle.detach()
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    net(ids).logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@torch.no_grad()
def test_what_is_saved_is_the_masked_model_and_nothing_is_loaded_over_it(net, library, ids, tmp_path):
    dense = {name: value.clone() for name, value in net.state_dict().items()}
    handle = pf.attach(net, library, keep_dense=False)
    expected = net(ids).logits
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    mask = library.masks["introvert"]
    name = next(iter(mask.words))
    assert torch.equal(net.state_dict()[f"{name}.weight"], dense[f"{name}.weight"] * mask.dense(name))
    for options in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(RuntimeError, match="dense weight was given up .keep_dense=False.; detach before loading"):
            net.load_state_dict(dense, **options)
    with pytest.warns(UserWarning, match="given up"):
        handle.detach()
    net.load_state_dict(dense)
    assert all(torch.equal(value, dense[name]) for name, value in net.state_dict().items())


@torch.no_grad()
def test_a_compressed_block_is_one_graph_of_torch_compile(net, library):
    pf.attach(net, library, keep_dense=False)
    mlp, x = net.model.layers[0].mlp, torch.randn(1, 1, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-5, atol=1e-5)
