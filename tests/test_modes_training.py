"""Steering while a model is trained: gradients with and without checkpointing, against hooks by hand."""

import copy
import functools

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.models.anatomy import anatomy

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
PERSONAS = [pf.Persona(vectors={"creative": 1.0, "futurist": 0.5}), None, pf.Persona(vectors={"creative": 2.0})]
OTHERS = [None, pf.Persona(vectors={"creative": 9.0}), pf.Persona(vectors={"futurist": 3.0})]
IDS = torch.randint(3, tiny.VOCAB, (3, 6), generator=torch.Generator().manual_seed(7))


def loss(net, **more):
    logits = net(IDS, use_cache=False, **more).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(net):
    found = {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}
    net.zero_grad()
    return found


def same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def reentrant(request):
    return {"gradient_checkpointing_kwargs": {"use_reentrant": request.param}}


@pytest.fixture(params=["forward", "call"], autouse=True)
def what_is_computed_again(request, net):
    """Releases of transformers differ in whether a block's hooks are part of what is computed again."""
    kind = type(net.model.layers[0])

    class Whole(kind):
        def __call__(self, *args, **kwargs):
            checkpoint = self.__dict__.get("_gradient_checkpointing_func")
            inner = functools.partial(kind.__call__, self, **kwargs)
            return inner(*args) if checkpoint is None else checkpoint(inner, *args)

    if request.param == "call":
        Whole.gradient_checkpointing = property(lambda self: False, lambda self, value: None)
        for layer in net.model.layers:
            layer.__dict__.pop("gradient_checkpointing", None)
            layer.__class__ = Whole


def test_the_gradient_is_that_of_a_hook_by_hand(net, library):
    vector = library.vectors["creative"]
    hooks = [
        anatomy(net).blocks[block].register_forward_hook(lambda _, __, out, row=vector.directions[block]: out + row)
        for block in vector.blocks
    ]
    loss(net).backward()
    hand = gradients(net)
    for hook in hooks:
        hook.remove()
    with pf.attach(net, library) as personas, personas.using([pf.Persona(vectors={"creative": 1.0})] * 3):
        loss(net).backward()
    same(gradients(net), hand)


@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.parametrize("backward", ["outside", "inside another"])
def test_what_is_computed_again_carries_the_personas_of_its_forward(net, library, reentrant, enabled, backward):
    net.train()
    with pf.attach(net, library) as personas, personas.using(PERSONAS):
        loss(net).backward()
    expected = gradients(net)
    if enabled == "before":
        net.gradient_checkpointing_enable(**reentrant)
        net.enable_input_require_grads()
    with pf.attach(net, library) as personas:
        if enabled == "after":
            net.gradient_checkpointing_enable(**reentrant)
            net.enable_input_require_grads()
        with personas.using(PERSONAS):
            value = loss(net)
        if backward == "outside":
            value.backward()
        else:
            with personas.using(OTHERS):
                value.backward()
        found = gradients(net)
        called = loss(net, personas=PERSONAS)
        called.backward()
        again = gradients(net)
    same(found, expected)
    same(again, expected)


def test_a_plain_forward_stays_plain_when_it_is_computed_again_beside_personas(net, library, reentrant):
    net.train()
    loss(net).backward()
    expected = gradients(net)
    net.gradient_checkpointing_enable(**reentrant)
    net.enable_input_require_grads()
    with pf.attach(net, library) as personas:
        value = loss(net)
        with personas.using(OTHERS):
            value.backward()
    same(gradients(net), expected)


def test_positions_are_those_of_the_forward(net, library, reentrant):
    net.train()
    steps = [pf.Persona(steering=[pf.Steering({"creative": 1.0}, positions="response")]), None, None]
    with pf.attach(net, library) as personas:
        with personas.using(steps, prompt_lengths=[2, 3, 4]):
            loss(net).backward()
        expected = gradients(net)
        net.gradient_checkpointing_enable(**reentrant)
        net.enable_input_require_grads()
        with personas.using(steps, prompt_lengths=[2, 3, 4]):
            value = loss(net)
        with personas.using(steps, prompt_lengths=[5, 1, 1]):
            value.backward()
    same(gradients(net), expected)


def test_detach_before_backward_is_refused_where_personas_would_be_lost(net, library, reentrant):
    net.train()
    net.gradient_checkpointing_enable(**reentrant)
    net.enable_input_require_grads()
    functions = [block._gradient_checkpointing_func for block in net.model.layers]
    with pf.attach(net, library) as personas:
        with personas.using(PERSONAS):
            value = loss(net)
        plain = loss(net)
    with pytest.raises(pf.PersonafastError, match="backward"):
        value.backward()
    plain.backward()
    assert [block._gradient_checkpointing_func for block in net.model.layers] == functions


def test_a_copy_of_an_attached_model_checkpoints_for_itself(net, library, reentrant):
    net.train()
    with pf.attach(net, library) as personas:
        with personas.using(PERSONAS):
            loss(net).backward()
        expected = gradients(net)
        net.gradient_checkpointing_enable(**reentrant)
        net.enable_input_require_grads()
        loss(net).backward()
        twin = copy.deepcopy(net)
        net.zero_grad(), twin.zero_grad()
        value = loss(twin, personas=PERSONAS)
        with personas.using(OTHERS):
            value.backward()
    same(gradients(twin), expected)
