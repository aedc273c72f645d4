"""Masks beside vectors, policies and prompts, in one persona and in rows of one batch."""

import copy

import pytest
import torch
from helpers import gates, tiny

import personafast as pf
from personafast.models.anatomy import anatomy

STRENGTHS = {"formal": 0.7, "warm": 0.5}
VECTORS = {"creative": 1.5}
# What a row's mask is, and the shares by which its gate is made by hand.
MASKS = {
    "none": (None, {}),
    "hard": ("hard", {"hard": 1.0}),
    "soft": ("soft", {"soft": 1.0}),
    "mixed": ({"hard": 0.6, "soft": 0.4}, {"hard": 0.6, "soft": 0.4}),
}
NEW = 6


@pytest.fixture
def masks(net):
    return {"hard": gates.random_mask(net, 1), "soft": gates.random_mask(net, 2, gamma=0.4, leave=("o_proj",))}


@pytest.fixture
def joined(library, masks):
    for name, mask in masks.items():
        library.add_mask(name, mask)
    return library


@pytest.fixture
def ids():
    return torch.randint(3, tiny.VOCAB, (1, 6), generator=torch.Generator().manual_seed(4))


class ByHand:
    """Next-token log-probabilities of a masked, steered model, whose policies are merged into weights."""

    def __init__(self, net, library, masks, shares, vectors, policy=None):
        self.net = gates.gated(net, masks, shares)
        if policy is not None:
            # W * G + s B A: the update is added beside the gate, not through it.
            for path, factors in library.policies[policy].factors.items():
                linear = anatomy(self.net).linears[path]
                linear.weight.data += factors.scale * factors.b @ factors.a
        for block, layer in enumerate(self.net.model.layers):
            added = sum(
                (
                    c * library.vectors[name].directions[block]
                    for name, c in vectors.items()
                    if block in library.vectors[name].blocks
                ),
                torch.zeros(tiny.HIDDEN),
            )
            layer.register_forward_hook(lambda _, args, out, added=added: moved(out, added))

    @torch.no_grad()
    def __call__(self, ids):
        return self.net(ids).logits[0, -1].log_softmax(-1)


def moved(out, added):
    return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added


def greedy(library, net, masks, ids, shares, vectors, policies):
    """log pi_0 + sum_i alpha_i (log pi_i - log pi_0), the likeliest token, token by token."""
    reference = ByHand(net, library, masks, shares, vectors)
    others = {name: ByHand(net, library, masks, shares, vectors, name) for name in policies}
    for _ in range(NEW):
        own = reference(ids)
        target = own + sum(alpha * (others[name](ids) - own) for name, alpha in policies.items())
        ids = torch.cat([ids, target.argmax()[None, None]], dim=1)
    return ids


def every_persona():
    return [
        (pf.Persona(mask=mask, vectors=vectors, policies=policies), shares, vectors, policies)
        for mask, shares in MASKS.values()
        for vectors in ({}, VECTORS)
        for policies in ({}, STRENGTHS)
    ]


def texts(net, library, ids, personas, *, graphs=False, **options):
    with pf.attach(net, library, graphs=graphs) as handle, torch.no_grad():
        return net.generate(
            ids.expand(len(personas), -1),
            custom_generate=handle.generate,
            personas=personas,
            do_sample=options.pop("do_sample", False),
            max_new_tokens=NEW,
            min_p=0.0,
            **options,
        )


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("options", [{}, {"graphs": True}, {"sampler": "verify"}, {"sampler": "block"}], ids=str)
def test_every_mix_of_mechanisms_in_one_batch_speaks_as_by_hand(net, joined, masks, ids, options):
    cases = every_persona()
    plain = copy.deepcopy(net)
    found = texts(net, joined, ids, [case[0] for case in cases], **options)
    for row, (persona, *parts) in zip(found, cases, strict=True):
        expected = greedy(joined, plain, masks, ids, *parts)
        assert torch.equal(row, expected[0]), persona


@pytest.mark.usefixtures("reference_backend")
def test_drawn_texts_do_not_depend_on_recordings_or_company(net, joined, ids):
    personas = [case[0] for case in every_persona()]
    seeds = list(range(len(personas)))
    eager = texts(net, joined, ids, personas, do_sample=True, seeds=seeds)
    recorded = texts(net, joined, ids, personas, do_sample=True, seeds=seeds, graphs=True)
    assert torch.equal(eager, recorded)
    for row in (3, 9, 15):
        assert torch.equal(texts(net, joined, ids, [personas[row]], do_sample=True, seeds=[row])[0], eager[row])


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("mask", ["hard", "soft", {"hard": 0.6, "soft": 0.4}], ids=str)
def test_a_prompt_persona_is_heard_through_the_mask(net, joined, masks, ids, mask):
    tokenizer = tiny.tokenizer()
    shares = {mask: 1.0} if isinstance(mask, str) else mask
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is this"}], add_generation_prompt=True, return_tensors="pt"
    )
    prompt = prompt["input_ids"] if hasattr(prompt, "keys") else prompt
    text = "you are a pirate"
    told = tokenizer.apply_chat_template(
        [{"role": "system", "content": text}, {"role": "user", "content": "what is this"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    told = told["input_ids"] if hasattr(told, "keys") else told
    hand = ByHand(net, joined, masks, shares, {})
    expected, begun = prompt, told
    for _ in range(NEW):
        own, other = hand(expected), hand(begun)
        token = (own + 1.5 * (other - own)).argmax()[None, None]
        expected, begun = torch.cat([expected, token], 1), torch.cat([begun, token], 1)
    with pf.attach(net, joined, tokenizer=tokenizer) as handle, torch.no_grad():
        found = net.generate(
            prompt,
            custom_generate=handle.generate,
            personas=pf.Persona(mask=mask, prompts={text: 1.5}),
            do_sample=False,
            max_new_tokens=NEW,
            min_p=0.0,
        )
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("reference_backend")
def test_one_mask_alone_in_memory_goes_with_vectors_and_policies(net, library, masks, ids):
    expected = [
        greedy(library, net, {"hard": masks["hard"]}, ids, {"hard": 1.0}, vectors, policies)[0]
        for vectors in ({}, VECTORS)
        for policies in ({}, STRENGTHS)
    ]
    alone = pf.PersonaLibrary(library.shape)
    for name, vector in library.vectors.items():
        alone.add_vector(name, vector)
    for name, policy in library.policies.items():
        alone.add_policy(name, policy)
    alone.add_mask("hard", masks["hard"])
    personas = [
        pf.Persona(mask="hard", vectors=vectors, policies=policies)
        for vectors in ({}, VECTORS)
        for policies in ({}, STRENGTHS)
    ]
    handle = pf.attach(net, alone, keep_dense=False)
    with torch.no_grad():
        found = net.generate(
            ids.expand(4, -1),
            custom_generate=handle.generate,
            personas=personas,
            do_sample=False,
            max_new_tokens=NEW,
            min_p=0.0,
        )
    assert torch.equal(found, torch.stack(expected))
    with pytest.raises(pf.PersonafastError, match="a mixture of masks does not speak through mask 'hard'"):
        net(ids, personas=[pf.Persona(mask={"hard": 0.5, "soft": 0.5})])
