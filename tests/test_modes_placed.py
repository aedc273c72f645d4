"""Steering where weights are spread or away, and where transformers batches requests by itself."""

import pytest
import torch
from helpers import tiny
from helpers.hooks import adding, by_blocks
from helpers.placing import HOW, placed

import personafast as pf

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
BLEND = {"creative": 2.0, "futurist": 0.5}
IDS = torch.randint(3, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))
OPTIONS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dispatched_model(net, how, when, tmp_path):
    library = tiny.library(net, masks=False)
    plain = net.generate(IDS, **OPTIONS)
    with adding(net, [by_blocks(library, BLEND), None]):
        hand = net.generate(IDS, **OPTIONS)
    persona, policy = pf.Persona(vectors=BLEND), pf.Persona(policies={"formal": 1.0})
    with pf.attach(net, library) as personas:
        formal = net.generate(IDS, **OPTIONS, custom_generate=personas.generate, personas=policy)
    if when == "before":
        net = placed(net, how, tmp_path)
    personas = pf.attach(net, library)
    if when == "after":
        net = placed(net, how, tmp_path)
    nobody = net.generate(IDS, **OPTIONS)
    with personas.using([persona, None]):
        found = net.generate(IDS, **OPTIONS)
    own = net.generate(IDS, **OPTIONS, custom_generate=personas.generate, personas=[persona, None])
    ratio = net.generate(IDS, **OPTIONS, custom_generate=personas.generate, personas=policy)
    personas.detach()
    assert torch.equal(found, hand) and torch.equal(own, hand) and torch.equal(nobody, plain)
    assert torch.equal(ratio, formal)
    assert torch.equal(net.generate(IDS, **OPTIONS), plain) and not torch.equal(found, plain)


def batched(net, prompts):
    batching = pytest.importorskip("transformers.generation.configuration_utils")
    if not hasattr(batching, "ContinuousBatchingConfig"):
        pytest.skip("this transformers sizes its paged cache by the memory of the machine")
    settings = batching.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = batching.ContinuousBatchingConfig(num_blocks=16, block_size=8, max_batch_tokens=32)
    outputs = net.generate_batch(prompts, generation_config=settings, continuous_batching_config=room)
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]


@pytest.mark.slow
def test_continuous_batching_takes_one_persona_for_all_and_refuses_several(net):
    library = tiny.library(net, masks=False)
    prompts = [[5, 6, 7, 8], [9, 3], [4, 11, 12]]
    plain = batched(net, prompts)
    assert [len(tokens) for tokens in plain] == [5, 5, 5]
    with adding(net, [by_blocks(library, BLEND)]):
        hand = batched(net, prompts)
    persona = pf.Persona(vectors=BLEND)
    with pf.attach(net, library) as personas:
        nobody = batched(net, prompts)
        with personas.using([persona]):
            found = batched(net, prompts)
        shaped = pf.Persona(steering=[pf.Steering(BLEND, positions="response")])
        for refused in ([persona, None, persona], [shaped]):
            with personas.using(refused), pytest.raises(pf.PersonafastError, match="continuous batching"):
                batched(net, prompts)
    assert found == hand and nobody == plain and found != plain
    assert batched(net, prompts) == plain and "init_continuous_batching" not in net.__dict__
