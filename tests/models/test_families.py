"""Steering by `attach` against a plain hook that adds the vector, for every family that is known to work."""

import pytest
import torch
from helpers import families, tiny

import personafast as pf
from personafast.masks import build_mask, calibrate
from personafast.models.anatomy import anatomy
from personafast.models.reading import TokenizedText

NEW = 3
pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]


def every(common):
    marks = [] if common else [pytest.mark.slow]
    return [pytest.param(name, marks=marks) for name in families.names(common)]


def first(output):
    return output[0] if isinstance(output, (tuple, list)) else output


def by_hand(parts, directions):
    """Plain forward hooks that add a vector to every block's output."""

    def add(row):
        def hook(_, __, output):
            if isinstance(output, (tuple, list)):
                return type(output)([output[0] + row, *output[1:]])
            return output + row

        return hook

    return [block.register_forward_hook(add(row)) for block, row in zip(parts.blocks, directions, strict=True)]


@torch.no_grad()
def logits(net, ids):
    """Logits of a prefill without a cache [B, L], and of every step of a greedy text [B, NEW], in one tensor."""
    prefill = net(input_ids=ids, use_cache=False).logits
    text = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat([prefill, torch.stack(text.logits, dim=1)], dim=1)


def residual_stream(net, parts, ids):
    """What every block read and gave in one pass: [(input, output)]."""
    seen = {}
    hooks = []
    for index, block in enumerate(parts.blocks):

        def read(_, args, kwargs, index=index):
            seen[index] = [first(args or list(kwargs.values())).clone()]

        def gave(_, __, output, index=index):
            seen[index].append(first(output).clone())

        hooks += [block.register_forward_pre_hook(read, with_kwargs=True), block.register_forward_hook(gave)]
    with torch.no_grad():
        net(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [seen[index] for index in range(len(parts.blocks))]


@pytest.mark.parametrize("name", [*every(True), *every(False)])
def test_steering_is_adding_the_vector_to_the_residual_stream(name):
    net = families.build(name)
    parts = anatomy(net)
    draw = torch.Generator().manual_seed(1)
    directions = torch.randn(len(parts.blocks), parts.shape.hidden_size, generator=draw)
    ids = torch.randint(3, parts.shape.vocab_size, (2, 5), generator=draw)
    library = pf.PersonaLibrary(parts.shape)
    library.add_vector("creative", directions, blocks=range(len(parts.blocks)))
    persona = pf.Persona(vectors={"creative": 1.0})

    plain, state = logits(net, ids), list(net.state_dict())
    hooks = by_hand(parts, directions)
    hand = logits(net, ids)
    for hook in hooks:
        hook.remove()
    before = residual_stream(net, parts, ids)
    with pf.attach(net, library) as personas:
        nobody = logits(net, ids)
        with personas.using([persona, persona]):
            steered = logits(net, ids)
        with personas.using([persona, None]):
            mixed = logits(net, ids)
        with personas.using([pf.Persona(vectors={"creative": 1.0}, blocks=(0,))] * 2):
            after = residual_stream(net, parts, ids)
        assert list(net.state_dict()) == state
    detached = logits(net, ids)

    assert plain.shape[1] == ids.shape[1] + NEW and not torch.equal(plain, hand)
    assert torch.equal(steered, hand)
    assert torch.equal(nobody, plain) and torch.equal(detached, plain)
    if not families.BY_NAME[name].rows_mix:
        # Experts gather rows over the batch, so that another row beside changes a last bit.
        torch.testing.assert_close(mixed, torch.stack([hand[0], plain[1]]), rtol=1e-4, atol=1e-4)
    # The next block reads what this one gave, and the vector in it.
    assert torch.equal(before[1][0], before[0][1])
    assert torch.equal(after[1][0], before[0][1] + directions[0])


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_a_recurrent_state_bears_vectors_alone(name):
    net = families.build(name)
    parts = anatomy(net)
    library = pf.PersonaLibrary(parts.shape)
    library.add_vector("creative", torch.ones(len(parts.blocks), parts.shape.hidden_size))
    ids = torch.tensor([[5, 6, 7]])
    with pf.attach(net, library) as personas, pytest.raises(pf.UnsupportedModelError, match="personas: .* recurrent"):
        net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            custom_generate=personas.generate,
            personas=[pf.Persona(vectors={"creative": 1.0})],
        )
    with pytest.raises(pf.UnsupportedModelError, match="model: .* recurrent"):
        pf.PolicySet.from_prompts(net, {"calm": "Be calm."})
    library.add_policy("formal", tiny.policy(net, 1))
    with pytest.raises(pf.UnsupportedModelError, match="policies: .* recurrent"):
        pf.attach(net, library)
    library = pf.PersonaLibrary(parts.shape)
    library.add_mask("introvert", build_mask(net, calibrate(net, [TokenizedText([5, 6, 7], 2)]), sparsity=0.4))
    with pytest.raises(pf.UnsupportedModelError, match="masks: .* recurrent"):
        pf.attach(net, library)
    with torch.no_grad():
        net(ids)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("xlm", "several lists of XLMWithLMHeadModel"),
        ("xlnet", "XLNetLMHeadModel pass on several residual streams"),
        ("deepseek_v4", "DeepseekV4ForCausalLM pass on several residual streams"),
        ("hy_v4", "HYV4ForCausalLM pass on several residual streams"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name, why):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(families.configuration(name, {}))
    with pytest.raises(pf.UnsupportedModelError, match=why):
        pf.attach(net)
    assert not any(block._forward_hooks for block in net.modules())
