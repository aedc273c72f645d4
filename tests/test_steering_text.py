"""Steered texts: samplers, recordings, prompts of members, beams, personas that change on the way, stock generate."""

import copy
import functools
import itertools

import pytest
import torch
from helpers import by_hand, tiny, voices
from helpers.voices import chats, row_of, speak

import personafast as pf
from personafast import ops
from personafast.density.prompting import SystemPrompts
from personafast.models.anatomy import anatomy

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
CREATIVE, FUTURIST = {"creative": 2.0}, {"futurist": 1.5}
# Additions, a direction and a schedule of every kind, over one, two and three lanes.
STEERED = {
    "response": pf.Persona(steering=[pf.Steering(CREATIVE, positions="response", schedule="linear:6")]),
    "prompt": pf.Persona(CREATIVE, steering=[pf.Steering(FUTURIST, "ablate", positions="prompt")]),
    "last": pf.Persona(steering=[pf.Steering(FUTURIST, "replace", positions="last", strength=0.7)]),
    "spans": pf.Persona(
        steering=[
            pf.Steering(CREATIVE, "clamp", low=1.0, positions=[(1, 3), (-2, 2)]),
            pf.Steering(FUTURIST, positions=[(0, 2), (3, -1), (-1, 4)], schedule="first:3"),
            pf.Steering(CREATIVE, "norm_preserving", blocks=(0, 2)),
        ]
    ),
}
MIXED = [STEERED["response"], STEERED["spans"], STEERED["prompt"]]


def with_policies(persona):
    """The same steering under density ratios."""
    return pf.Persona(persona.vectors, policies={"formal": 0.7, "warm": 0.5}, steering=persona.steering)


@functools.cache
def on_their_own(name):
    """The greedy text of every row alone, token by token, and whether steering changed any."""
    net, persona, batch = tiny.model(), with_policies(STEERED[name]), chats()
    with pf.attach(net, tiny.library(net), tokenizer=tiny.tokenizer()) as handle:
        rows = [speak(net, handle, row_of(batch, row), persona, sampler="direct")[0] for row in range(3)]
        plain = speak(net, handle, batch, pf.Persona(policies=persona.policies))
    return rows, not all(torch.equal(row, other) for row, other in zip(rows, plain, strict=True))


@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "token_rs"])
@pytest.mark.parametrize("name", STEERED)
def test_exact_samplers_write_the_greedy_text_of_a_row_on_its_own(net, library, sampler, name):
    persona, (rows, steered) = with_policies(STEERED[name]), on_their_own(name)
    options = {} if sampler == "direct" or sampler == "token_rs" else {"chunk": 3, "draft": "reference"}
    with pf.attach(net, library, tokenizer=tiny.tokenizer()) as handle:
        found = speak(net, handle, chats(), persona, sampler=sampler, **options)
    assert steered and torch.equal(found, torch.stack(rows))


@pytest.mark.parametrize("sampler", ["scr", "mixture", "verify", "block"])
def test_sampled_texts_do_not_depend_on_the_batch(net, library, sampler):
    linear = {"aggregator": "linear"} if sampler == "mixture" else {}
    personas = [
        pf.Persona(p.vectors, policies={"formal": 0.7, "warm": 0.3}, steering=p.steering, **linear) for p in MIXED
    ]
    options = {"sampler": sampler, "do_sample": True, "chunk": 3}
    batch = chats()
    with pf.attach(net, library, tokenizer=tiny.tokenizer()) as handle:
        found = speak(net, handle, batch, personas, seeds=[5, 6, 7], **options)
        for row, seed in enumerate((5, 6, 7)):
            alone = speak(net, handle, row_of(batch, row), personas[row], seeds=[seed], **options)
            assert torch.equal(found[row], alone[0])


def test_drafts_that_are_rolled_back_leave_schedules_where_they_were(net, library):
    """A draft at random is refused nearly always, so every token is fed again at its place."""
    persona = STEERED["response"]
    with pf.attach(net, library) as handle:
        direct = speak(net, handle, chats(), persona)
        drafted = speak(
            net,
            handle,
            chats(),
            persona,
            sampler="verify",
            draft=tiny.model(seed=3),
            chunk=4,
            return_dict_in_generate=True,
        )
    assert torch.equal(direct, drafted.sequences[:, -voices.NEW :])
    assert drafted.stats.acceptance < 0.9


@pytest.mark.parametrize(("sampler", "sample"), [("direct", False), ("block", True)])
def test_recordings_serve_any_steps_of_the_same_lanes(library, sampler, sample):
    called, replayed = tiny.model(), tiny.model()
    batches = [MIXED, MIXED[::-1], [None, STEERED["last"], MIXED[1]]]
    with (
        pf.attach(called, library, tokenizer=tiny.tokenizer(), graphs=False) as first,
        pf.attach(replayed, library, tokenizer=tiny.tokenizer(), graphs=True) as second,
    ):
        made = []
        for personas in batches:
            given = [p and with_policies(p) for p in personas]
            texts = []
            for net, handle in ((called, first), (replayed, second)):
                texts.append(speak(net, handle, chats(), given, sampler=sampler, do_sample=sample, seed=4))
            assert torch.equal(*texts)
            made.append({key for context in second.cast.patch._contexts for key in context._recordings})
    # Other rows of other personas, the same lanes: not one recording more.
    assert made[0] == made[1] and made[0]


def test_a_recording_of_plain_additions_knows_nothing_of_positions(net, library):
    with pf.attach(net, library, graphs=True) as handle:
        speak(net, handle, chats(), [pf.Persona(CREATIVE), None, pf.Persona(FUTURIST)])
        keys = {key[0] for context in handle.cast.patch._contexts for key in context._recordings}
    assert keys == {(((0, 1, False, False),),)}


@pytest.mark.parametrize("graphs", [False, True])
def test_a_member_with_a_system_text_counts_from_its_own_prompt(net, library, graphs):
    text = "you are a calm lawyer"
    persona = pf.Persona(prompts={text: 1.0}, steering=STEERED["spans"].steering)
    batch = row_of(chats(), 2)
    whole = SystemPrompts(tiny.tokenizer()).insert(batch["input_ids"][0].tolist(), text)
    assert len(whole) > batch["input_ids"].shape[1]
    expected = by_hand.greedy(net, anatomy(net).blocks, library, STEERED["spans"], whole, voices.NEW)
    with pf.attach(net, library, tokenizer=tiny.tokenizer(), graphs=graphs) as handle:
        found = speak(net, handle, batch, persona, min_p=0.0)
    assert found[0].tolist() == expected


@pytest.mark.parametrize("mode", ["all", "prompt", "response"])
@torch.no_grad()
def test_persona_vectors_rule_gives_the_same_logits(net, library, mode):
    """Their hook adds at all tokens; at all tokens of passes over more than one; or at the last one of every pass."""
    vector, block = library.vectors["creative"].directions[1], net.model.layers[1]

    def theirs(_, __, output):
        if mode == "all" or (mode == "prompt" and output.shape[1] > 1):
            return output + 2.0 * vector
        if mode == "response":
            output = output.clone()
            output[:, -1] += 2.0 * vector
        return output

    batch = chats()
    tokens = torch.randint(3, tiny.VOCAB, (3, 4), generator=torch.Generator().manual_seed(1))

    def passes():
        cache, mask, found = None, batch["attention_mask"], []
        for ids in [batch["input_ids"], *tokens.split(1, dim=1)]:
            mask = mask if cache is None else torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = net(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1])
        return torch.stack(found)

    hook = block.register_forward_hook(theirs)
    expected = passes()
    hook.remove()
    persona = pf.Persona(steering=[pf.Steering(CREATIVE, blocks=(1,), positions=mode)])
    with pf.attach(net, library) as handle:
        plain = passes()
        with handle.using([persona] * 3):
            found = passes()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
    # Steering is not forgotten once there is a cache.
    assert not torch.allclose(found[-1], plain[-1], atol=1e-2)


@pytest.mark.parametrize("name", STEERED)
@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_count_from_the_prompt_of_their_row(net, library, name, more):
    batch, personas = chats(), [STEERED[name], None, MIXED[1]]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **more}
    with pf.attach(net, library) as handle:
        with handle.using(personas):
            together = net.generate(**batch, **options)[:, -5:]
        alone = []
        for row, persona in enumerate(personas):
            with handle.using([persona]):
                alone.append(net.generate(**row_of(batch, row), **options)[:, -5:])
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", STEERED)
def test_the_first_pass_of_assisted_decoding_holds_more_than_the_prompt(net, library, name):
    batch = row_of(chats(), 2)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = by_hand.greedy(
        net, anatomy(net).blocks, library, STEERED[name], batch["input_ids"][0].tolist(), options["max_new_tokens"]
    )
    with pf.attach(net, library) as handle, handle.using([STEERED[name]]):
        found = [
            net.generate(**batch, **options, assistant_model=tiny.model(seed=0)),
            net.generate(**batch, **options, prompt_lookup_num_tokens=3),
        ]
    assert [text[0, -8:].tolist() for text in found] == [expected] * 2


def test_padding_that_generate_finds_itself(net, library):
    """Without a mask transformers takes the pad tokens for padding; over a static cache passes have no 2D mask."""
    batch, personas = chats(), MIXED
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with pf.attach(net, library) as handle, handle.using(personas):
        expected = net.generate(**batch, **options)
        assert torch.equal(net.generate(batch["input_ids"], **options), expected)
        for mask in ({}, {"attention_mask": batch["attention_mask"]}):
            static = net.generate(
                batch["input_ids"], **mask, cache_implementation="static", disable_compile=True, **options
            )
            assert torch.equal(static, expected)


@torch.no_grad()
def test_personas_change_between_two_passes_over_one_cache(net, library):
    """Prompt and first tokens by one persona, the rest by another, and then by another version of a vector."""
    ids = row_of(chats(), 2)["input_ids"]
    prompt = ids.shape[1]
    personas = [
        STEERED["response"],
        pf.Persona(steering=[pf.Steering(FUTURIST, "clamp", target=3.0)]),
        STEERED["response"],
    ]
    blocks = anatomy(net).blocks

    def text(carry, swap):
        cache, token, found = None, ids, []
        for turn in range(3):
            with carry(turn, found):
                for _ in range(2):
                    out = net(token, past_key_values=cache, use_cache=True)
                    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
                    found.append(int(token))
            if turn == 1:
                swap()
        return found

    other = copy.deepcopy(library)
    other.add_vector("creative", -1 * library.vectors["futurist"].directions, blocks=(0, 1))

    def hooks(turn, found):
        seen = 0 if not found else prompt + len(found) - 1
        return by_hand.steering(net, blocks, library if turn < 2 else other, personas[turn], prompt, seen)

    expected = text(hooks, lambda: None)
    kept = text(lambda turn, found: hooks(0, found), lambda: None)
    mine = copy.deepcopy(library)
    with pf.attach(net, mine) as handle, handle.using([personas[0]]) as scope:

        class Carry:
            def __init__(self, turn, _):
                scope.set([personas[turn]])

            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

        found = text(Carry, lambda: mine.add_vector("creative", other.vectors["creative"]))
    assert found == expected and kept != expected


@torch.no_grad()
def test_nothing_of_a_request_is_left_for_the_next(net, library):
    """Scales, windows and prompt lengths belong to the call."""
    ids = row_of(chats(), 2)["input_ids"]
    with pf.attach(net, library) as handle:
        plain = net(ids).logits
        steered = net(ids, personas=[pf.Persona(CREATIVE)]).logits
        for persona in STEERED.values():
            speak(net, handle, chats(), [persona] * 3)
            with handle.using([persona], [3]):
                net(ids)
            assert torch.equal(net(ids, personas=[pf.Persona(CREATIVE)]).logits, steered)
            assert torch.equal(net(ids).logits, plain)
            assert handle.cast.patch.steering.rows is handle.cast.patch.steering.generation is None


@torch.no_grad()
def test_where_nobody_tells_the_prompts_a_pass_without_a_cache_is_all_prompt(net, library):
    ids = row_of(chats(), 2)["input_ids"]
    response = pf.Persona(steering=[pf.Steering(CREATIVE, positions="response")])
    last = pf.Persona(steering=[pf.Steering(CREATIVE, positions="last")])
    with pf.attach(net, library) as handle:
        assert torch.equal(net(ids, personas=[response]).logits, net(ids, personas=[last]).logits)
        told = net(ids, personas=[response], prompt_lengths=[3]).logits
        assert not torch.equal(told, net(ids, personas=[last]).logits)
        cache = net(ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(pf.PersonafastError, match="prompt_lengths: this pass goes on from a cache"):
            net(ids[:, 5:], past_key_values=cache, personas=[response])
        # What counts from the row's beginning needs no prompt.
        spans = pf.Persona(steering=[pf.Steering(CREATIVE, positions=[(5, 7)])])
        net(ids[:, 5:], past_key_values=cache, personas=[spans])
        with (
            pytest.raises(pf.PersonafastError, match="prompt_lengths: 2 given for 1 rows"),
            handle.using([last], [1, 2]),
        ):
            pass
        with pytest.raises(pf.PersonafastError, match="prompt_lengths: -1 is negative"):
            net(ids, personas=[last], prompt_lengths=[-1])
        with pytest.raises(pf.PersonafastError, match="prompt_lengths: given without personas"):
            net(ids, prompt_lengths=[1])


def test_generate_is_wrapped_while_attached(net, library):
    ids = row_of(chats(), 1)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    handle = pf.attach(net, library)
    assert "generate" in net.__dict__
    twin = copy.deepcopy(net)
    with handle.using([STEERED["response"]]):
        expected = net.generate(ids, **options)
    mine = twin.__dict__["_personafast_handle"]
    assert mine.model is twin
    with mine.using([STEERED["response"]]):
        assert torch.equal(twin.generate(ids, **options), expected)
    handle.detach()
    assert "generate" not in net.__dict__
    other = pf.attach(net, library)
    ours = net.generate
    net.generate = lambda *args, **kwargs: ours(*args, **kwargs)
    other.detach()
    assert "generate" in net.__dict__ and net.generate(ids, **options).shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("count", [1, 6])
def test_vectors_added_at_the_same_tokens_are_one_row(net, library, count):
    steps = [pf.Steering({"creative": 0.3 * n + 0.1}, strength=1.0 + n, positions="response") for n in range(count)]
    with pf.attach(net, library, max_personas=1) as handle:
        found = handle.cast.steps([pf.Persona(steering=steps)])[0]
        assert len(found) == 1
        total = sum((0.3 * n + 0.1) * (1.0 + n) for n in range(count))
        strength = found[0].window.strength
        row = handle.cast.patch.steering.adds.at(1)[0]
        torch.testing.assert_close(strength * row, total * library.vectors["creative"].directions[1])


def test_lanes_keep_the_order_of_a_persona(net, library):
    add, ablate = pf.Steering(CREATIVE), pf.Steering(FUTURIST, "ablate")
    later = pf.Steering(CREATIVE, positions="last")
    orders = [
        ([add, ablate], [0, 1]),
        ([ablate, add], [1, 2]),
        ([ablate, ablate], [1, 3]),
        ([add, later], [0, 2]),
        ([add, ablate, add, later, ablate], [0, 1, 2, 4, 5]),
        ([add, add], [0]),
    ]
    with pf.attach(net, library) as handle:
        for steps, lanes in orders:
            assert [step.lane for step in handle.cast.steps([pf.Persona(steering=steps)])[0]] == lanes


@torch.no_grad()
def test_a_block_where_nobody_acts_is_left_alone(net, library, monkeypatch):
    seen = []
    real = ops.inject_
    monkeypatch.setattr(ops, "inject_", lambda *args: (seen.append(args[1].data_ptr()), real(*args)))
    with pf.attach(net, library) as handle:
        ids = row_of(chats(), 1)["input_ids"]
        net(ids, personas=[pf.Persona({"creative": 1.0}, blocks=(0, 1, 2))])
        assert len(seen) == 3
        seen.clear()
        net(ids, personas=[pf.Persona({"creative": 1.0}, blocks=(1,))])
        assert seen == [handle.cast.patch.steering.adds.at(1).data_ptr()]
        seen.clear()
        prompt = pf.Persona(steering=[pf.Steering(CREATIVE, blocks=(1,), positions="prompt")])
        speak(net, handle, row_of(chats(), 1), [prompt])
        assert len(seen) == 1  # none of the decoding steps


def test_rows_of_the_banks_are_counted_before_any_goes(net, library):
    many = [
        pf.Persona(steering=[pf.Steering({"creative": float(n)}), pf.Steering({"futurist": float(n)}, "replace")])
        for n in (1, 2, 3)
    ]
    with pf.attach(net, library, max_personas=2) as handle:
        before = speak(net, handle, chats(), [many[0], many[1], None])
        with pytest.raises(pf.PersonafastError, match="needs 3 rows of the bank, .* and it has 2; .* max_personas"):
            speak(net, handle, chats(), many)
        with (
            handle.using(many[:1]),
            pytest.raises(pf.PersonafastError, match="2 rows .* beside 1 of personas in force"),
        ):
            handle.cast.steps(many[1:])
        assert torch.equal(speak(net, handle, chats(), [many[0], many[1], None]), before)
    # Strengths, positions and schedules take no row of their own.
    shaped = [
        pf.Persona(steering=[pf.Steering(CREATIVE, strength=a, positions=where, schedule=when)])
        for a, where, when in itertools.product((0.5, 2.0), ("all", "last"), ("constant", "first:2"))
    ]
    with pf.attach(net, library, max_personas=1) as handle:
        assert {step.slot for steps in handle.cast.steps(shaped) for step in steps} == {0}


@pytest.mark.parametrize("name", STEERED)
def test_kernels_agree_with_the_reference(net, library, name):
    ids = row_of(chats(), 2)["input_ids"]
    with torch.no_grad(), pf.attach(net, library):
        expected = net(ids, personas=[STEERED[name]], prompt_lengths=[4]).logits
        with ops.use_backend("auto"):
            found = net(ids, personas=[STEERED[name]], prompt_lengths=[4]).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_slot_with_nothing_to_do_at_a_block_leaves_its_row_alone(net, library):
    """Rows of one lane act at different blocks, whose bank then holds a row for each of them."""
    ids = torch.randint(3, tiny.VOCAB, (4, 5), generator=torch.Generator().manual_seed(8))
    steps = [
        pf.Steering(FUTURIST, "ablate", blocks=(1,)),
        pf.Steering(CREATIVE, "replace", blocks=(0,), strength=0.5),
        pf.Steering(CREATIVE, "clamp", blocks=(1,), target=3.0),
        pf.Steering(FUTURIST, "norm_preserving", blocks=(0, 2)),
    ]
    personas = [pf.Persona(steering=[step]) for step in steps]
    with pf.attach(net, library) as handle:
        together = net(ids, personas=personas).logits
        assert len(handle.cast.patch.steering.directions.acts(0)) == 1
    for row, persona in enumerate(personas):
        alone = by_hand.logits(net, anatomy(net).blocks, library, persona, ids[row].tolist(), 5)
        torch.testing.assert_close(together[row], alone, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_stopping_criterion_may_change_the_personas_of_its_own_generation(net, library):
    """What a server does between two tokens: the prompt's end is still known to the new persona."""
    batch = row_of(chats(), 2)
    first, second = (
        STEERED["response"],
        pf.Persona(steering=[pf.Steering(FUTURIST, strength=4.0, positions="response")]),
    )
    options = {**batch, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    start = batch["input_ids"].shape[1]
    with pf.attach(net, library) as handle, handle.using([first]) as scope:

        def swap(ids, _, **__):
            if ids.shape[1] == start + 3:
                scope.set([second])
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        found = net.generate(**options, stopping_criteria=[swap])[0].tolist()
    cache, expected, ids = None, [], batch["input_ids"]
    for turn in range(8):
        persona = first if turn < 3 else second
        with by_hand.steering(net, anatomy(net).blocks, library, persona, start, 0 if turn == 0 else start + turn - 1):
            out = net(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        expected.append(int(ids))
    assert found[start:] == expected


@torch.no_grad()
def test_passes_that_a_callback_makes_have_prompts_of_their_own(net, library):
    batch, other = row_of(chats(), 2), row_of(chats(), 0)["input_ids"]
    assert batch["input_ids"].shape[1] > other.shape[1]
    seen = []
    with pf.attach(net, library) as handle:
        expected = net(other, personas=[STEERED["last"]]).logits

        def look(ids, _, **__):
            seen.append(net(other, personas=[STEERED["last"]]).logits)
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        with handle.using([STEERED["response"]]):
            undisturbed = net.generate(**batch, max_new_tokens=4, do_sample=False)
            found = net.generate(**batch, max_new_tokens=4, do_sample=False, stopping_criteria=[look])
    assert torch.equal(found, undisturbed) and len(seen) == 4
    assert all(torch.equal(logits, expected) for logits in seen)
