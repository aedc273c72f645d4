"""Blends that somebody still needs stay in a bank that is full: others are refused, and never take their place."""

import gc

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.masks import PersonaMask

pytestmark = pytest.mark.usefixtures("reference_backend")
IDS = torch.randint(3, tiny.VOCAB, (1, 6), generator=torch.Generator().manual_seed(7))
TEXT = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
ONE, TWO, THREE = (pf.Persona(vectors={"creative": c, "futurist": 1.0}) for c in (3.0, -3.0, 6.0))
FULL = "beside 1 of personas in force and of texts that are being written, and it has 1; .*max_personas"


def interrupting(work):
    return [lambda ids, _, **__: (work(), torch.zeros(ids.shape[0], dtype=torch.bool))[1]]


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["direct", "block"])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_text_that_is_being_written(net, library, sampler, graphs):
    options = {**TEXT, "personas": ONE, "sampler": sampler}
    with pf.attach(net, library, graphs=graphs) as handle:
        expected = net.generate(IDS, custom_generate=handle.generate, **options)
        other = net(IDS, personas=[TWO]).logits
    seen = []
    with pf.attach(net, library, graphs=graphs, max_personas=1) as handle:

        def refused():
            with pytest.raises(pf.PersonafastError, match=FULL):
                net(IDS, personas=[TWO])
            seen.append(1)

        found = net.generate(IDS, custom_generate=handle.generate, stopping_criteria=interrupting(refused), **options)
        assert torch.equal(found, expected) and seen
        # The text is done, and nobody needs a garbage collector to see it.
        gc.collect()
        gc.disable()
        try:
            assert torch.equal(net.generate(IDS, custom_generate=handle.generate, **options), expected)
            assert torch.equal(net(IDS, personas=[TWO]).logits, other)
        finally:
            gc.enable()
    with pf.attach(net, library, graphs=graphs, max_personas=2) as handle:

        def served():
            seen.append(net(IDS, personas=[TWO if len(seen) % 2 else THREE]).logits)

        found = net.generate(IDS, custom_generate=handle.generate, stopping_criteria=interrupting(served), **options)
    assert torch.equal(found, expected)
    assert any(isinstance(logits, torch.Tensor) and torch.equal(logits, other) for logits in seen)


@torch.no_grad()
def test_a_logits_processor(net, library):
    def text(handle, between):
        # What runs between its passes stands behind the processor.
        processor = pf.MPGLogitsProcessor(handle, pf.Persona(vectors={"creative": 3.0}, policies={"formal": 1.0}), IDS)
        return net.generate(IDS, **TEXT, logits_processor=[processor], stopping_criteria=interrupting(between))

    with pf.attach(net, library) as handle:
        expected = text(handle, lambda: None)
    with pf.attach(net, library, max_personas=1) as handle:

        def between():
            with pytest.raises(pf.PersonafastError, match=FULL):
                net(IDS, personas=[TWO])

        assert torch.equal(text(handle, between), expected)
        net(IDS, personas=[TWO])


@torch.no_grad()
def test_personas_two_scopes_out(net, library):
    with pf.attach(net, library) as handle, handle.using([ONE]):
        expected = net(IDS).logits
    with pf.attach(net, library, max_personas=2) as handle, handle.using([ONE]):
        with handle.using([TWO]):
            with pytest.raises(pf.PersonafastError, match="beside 2 of personas in force"):
                net(IDS, personas=[THREE])
        assert torch.equal(net(IDS).logits, expected)
        net(IDS, personas=[THREE])
        assert torch.equal(net(IDS).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_computed_again(net, library, reentrant):
    def gradient(max_personas, checkpointing):
        if checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            net.enable_input_require_grads()
        with pf.attach(net, library, max_personas=max_personas) as handle:
            with handle.using([ONE]):
                loss = net(IDS, labels=IDS, use_cache=False).loss
            if checkpointing:
                with pytest.raises(pf.PersonafastError, match=FULL):
                    net(IDS, personas=[TWO])
            loss.backward()
            del loss
            net(IDS, personas=[TWO])
        found = net.model.layers[0].mlp.up_proj.weight.grad.clone()
        net.zero_grad()
        return found

    net.train()
    torch.testing.assert_close(gradient(1, True), gradient(1, False), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_set_may_fill_a_bank_with_others_and_a_failed_one_changes_nothing(net, library):
    with pf.attach(net, library):
        two = net(IDS, personas=[TWO]).logits
    with pf.attach(net, library, max_personas=1) as handle, handle.using([ONE]) as scope:
        one = net(IDS).logits
        scope.set([TWO])
        assert torch.equal(net(IDS).logits, two) and not torch.equal(one, two)
        for bad in ([ONE, THREE], [pf.Persona(vectors={"creative": 1.0}, blocks=[9])], 3, [ONE, "pirate"]):
            with pytest.raises(pf.PersonafastError):
                scope.set(bad)
            assert torch.equal(net(IDS).logits, two)
        with pytest.raises(pf.PersonafastError, match="prompt_lengths"):
            scope.set([ONE], [-1])
        assert torch.equal(net(IDS).logits, two)


@torch.no_grad()
def test_a_scope_that_is_over_or_not_the_innermost_one_sets_nothing(net, library):
    with pf.attach(net, library) as handle:
        plain = net(IDS).logits
        with handle.using([ONE]) as outer:
            one = net(IDS).logits
            with handle.using([TWO]):
                two = net(IDS).logits
                with pytest.raises(pf.PersonafastError, match="set: .* another one is in force inside it"):
                    outer.set([THREE])
                assert torch.equal(net(IDS).logits, two)
            assert torch.equal(net(IDS).logits, one)
        with pytest.raises(pf.PersonafastError, match="set: .* it has ended"):
            outer.set([THREE])
        assert torch.equal(net(IDS).logits, plain)


@torch.no_grad()
def test_one_persona_stands_for_all_rows(net, library):
    ids = IDS.expand(3, -1)
    shaped = pf.Persona(steering=[pf.Steering({"creative": 2.0}, positions="response")])
    with pf.attach(net, library) as handle:
        expected = net(ids, personas=[shaped] * 3, prompt_lengths=[2, 3, 4]).logits
        with handle.using(shaped, [2, 3, 4]):
            assert torch.equal(net(ids).logits, expected)
        with pytest.raises(pf.PersonafastError, match="personas: expected a Persona or one a row, got str"):
            net(ids, personas="pirate")
        with pytest.raises(pf.PersonafastError, match="prompt_lengths: expected one whole number a row, got 3"):
            net(ids, personas=shaped, prompt_lengths=3)


@torch.no_grad()
def test_a_vector_that_is_written_to_in_place_is_used_as_it_is_now(net, library):
    with pf.attach(net, library):
        before = net(IDS, personas=[ONE]).logits
        library.vectors["creative"].directions.mul_(-1)
        assert not torch.equal(net(IDS, personas=[ONE]).logits, before)
        library.vectors["creative"].directions.mul_(-1)
        assert torch.equal(net(IDS, personas=[ONE]).logits, before)


@torch.no_grad()
def test_masks_and_policies_that_come_later_do_not_take_the_slots_of_those_in_use(net, library):
    masked = pf.Persona(mask="introvert")
    with pf.attach(net, library) as handle:
        expected = net(IDS, personas=[masked]).logits
        processor = pf.MPGLogitsProcessor(handle, pf.Persona(policies={"formal": 1.0}), IDS)
        text = net.generate(IDS, **TEXT, logits_processor=[processor])
        processor = pf.MPGLogitsProcessor(handle, pf.Persona(policies={"formal": 1.0}), IDS)
        with handle.using([masked]):
            library.add_policy("a", tiny.policy(net, 7))
            words = {path: torch.zeros_like(part) for path, part in library.masks["introvert"].words.items()}
            library.add_mask("a", PersonaMask(words, dict(library.masks["introvert"].in_features)))
            assert not torch.allclose(net(IDS, personas=[pf.Persona(mask="a")]).logits, expected)
            assert torch.equal(net(IDS).logits, expected)
        assert torch.equal(net.generate(IDS, **TEXT, logits_processor=[processor]), text)
