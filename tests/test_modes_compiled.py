"""Steering inside compiled models: one graph whoever speaks, equal to vectors added by hand."""

import pytest
import torch
import torch._dynamo
from helpers import tiny
from helpers.hooks import adding, by_blocks

import personafast as pf

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
BLENDS = [{"creative": 2.0}, {"creative": 0.5, "futurist": 1.0}, {"futurist": -1.0}]
IDS = torch.randint(3, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))


class Counting:
    """A backend that runs the operators as they are, and counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __deepcopy__(self, _):
        return self  # generate copies its settings

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("first", [pytest.param("compiled", marks=pytest.mark.slow), "attached"])
def test_one_graph_serves_all_personas(net, library, first):
    counting = Counting()
    plain = net(IDS, use_cache=False).logits
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    if first == "compiled":
        compiled(IDS, use_cache=False)
    with pf.attach(net, library) as personas:
        counting.graphs = 0
        assert torch.equal(compiled(IDS, use_cache=False).logits, plain)
        nobody = counting.graphs
        for blend in BLENDS:
            with adding(net, [by_blocks(library, blend), None]):
                hand = net(IDS, use_cache=False).logits
            with personas.using([pf.Persona(vectors=blend), None]):
                assert torch.equal(compiled(IDS, use_cache=False).logits, hand)
        assert nobody == 1 and counting.graphs == 2
        with personas.using([pf.Persona(vectors=BLENDS[0])]):  # the batch is a multiple of the rows
            both = compiled(IDS, use_cache=False).logits
        with adding(net, [by_blocks(library, BLENDS[0])] * 2):
            assert torch.equal(both, net(IDS, use_cache=False).logits)
    assert torch.equal(compiled(IDS, use_cache=False).logits, plain)


@pytest.mark.slow
@torch.no_grad()
def test_steps_with_positions_leave_the_graph_and_stay_right(net, library):
    personas = [pf.Persona(steering=[pf.Steering({"creative": 1.0}, positions=[(2, 4)])]), None]
    ablating = [None, pf.Persona(steering=[pf.Steering({"creative": 1.0}, operation="ablate")])]
    compiled = torch.compile(net, backend=Counting())
    with pf.attach(net, library) as handle:
        for carried in (personas, ablating, personas):
            with handle.using(carried):
                expected = net(IDS, use_cache=False).logits
                assert torch.equal(compiled(IDS, use_cache=False).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "transformers' own"])
def test_generate_with_a_compiled_forward(net, library, mode):
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    rows = [by_blocks(library, BLENDS[0]), None]
    with adding(net, rows):
        hand = net.generate(IDS, **options)
    plain = net.generate(IDS, **options)
    counting = Counting()
    with pf.attach(net, library) as personas:
        if mode == "forward":
            net.forward = torch.compile(net.forward, backend=counting, dynamic=True)
        else:
            from transformers import CompileConfig

            settings = CompileConfig(fullgraph=True, backend=counting, mode=None)
            settings._compile_all_devices = True
            options |= {"cache_implementation": "static", "compile_config": settings}
        with personas.using([pf.Persona(vectors=BLENDS[0]), None]):
            found = net.generate(IDS, **options)
        made = counting.graphs
        with personas.using([pf.Persona(vectors=BLENDS[1]), pf.Persona(vectors=BLENDS[2])]):
            other = net.generate(IDS, **options)
        again = counting.graphs
        nobody = net.generate(IDS, **options)
        if mode == "forward":
            del net.forward
    assert 0 < made == again, "other personas are other values of one graph"
    assert torch.equal(found, hand) and torch.equal(nobody, plain)
    assert not torch.equal(other, hand) and not torch.equal(found, plain)


@torch.no_grad()
@pytest.mark.slow
def test_inductor(net, library):
    compiled = torch.compile(net, fullgraph=True)
    with pf.attach(net, library) as personas:
        for blend in BLENDS:
            with adding(net, [by_blocks(library, blend), None]):
                hand = net(IDS, use_cache=False).logits
            with personas.using([pf.Persona(vectors=blend), None]):
                torch.testing.assert_close(compiled(IDS, use_cache=False).logits, hand, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gradients_of_a_compiled_model(net, library):
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with adding(net, [by_blocks(library, BLENDS[0]), None]):
        net(IDS, use_cache=False).logits.square().mean().backward()
    hand = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    with pf.attach(net, library) as personas, personas.using([pf.Persona(vectors=BLENDS[0]), None]):
        compiled(IDS, use_cache=False).logits.square().mean().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, hand[name], rtol=1e-4, atol=1e-6)
