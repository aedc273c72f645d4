"""`attach` and generation with personas, against plain transformers and against arithmetic by hand."""

import copy

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.models.anatomy import anatomy

NEW = 10
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox"]
pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]


def greedy(net, handle, batch, personas, **more):
    return net.generate(
        **batch, max_new_tokens=NEW, do_sample=False, custom_generate=handle.generate, personas=personas, **more
    )


def single(batch, row):
    """One row of a padded batch on its own, without padding."""
    return {"input_ids": batch["input_ids"][row][batch["attention_mask"][row].bool()][None]}


def by_hand(net, ids, vector, blocks):
    """Greedy tokens without a cache, the vector added at every position of the blocks' outputs."""
    hooks = []
    for index in blocks:
        row = vector[index]

        def add(_, __, output, row=row):
            return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

        hooks.append(anatomy(net).blocks[index].register_forward_hook(add))
    for _ in range(NEW):
        ids = torch.cat([ids, net(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    for hook in hooks:
        hook.remove()
    return ids


PERSONAS = [
    pf.Persona(),
    pf.Persona(vectors={"creative": 1.0, "futurist": 0.5}),
    pf.Persona(mask="introvert"),
    pf.Persona(policies={"formal": 1.0, "warm": 1.0}),
    pf.Persona(policies={"formal": 0.6, "warm": 0.4}, aggregator="linear"),
    pf.Persona(vectors={"creative": 1.0}, mask="introvert", policies={"warm": 0.7}),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_persona_gives_the_tokens_of_the_unpatched_model(family, batch):
    net = tiny.model(family)
    plain = [net.generate(**single(batch, row), max_new_tokens=NEW, do_sample=False)[0, -NEW:] for row in range(3)]
    with pf.attach(net, tiny.library(net, masks=family != "gpt2")) as handle:
        none = greedy(net, handle, batch, None)
        mixed = greedy(net, handle, batch, [None, pf.Persona(vectors={"creative": 9.0}), None])
    assert torch.equal(none[:, -NEW:], torch.stack(plain))
    assert torch.equal(mixed[[0, 2], -NEW:], torch.stack(plain)[[0, 2]])
    assert not torch.equal(mixed[1, -NEW:], plain[1])


@pytest.mark.parametrize("persona", PERSONAS, ids=range(len(PERSONAS)))
def test_padded_rows_give_the_tokens_of_single_rows(net, library, batch, persona):
    with pf.attach(net, library) as handle:
        together = greedy(net, handle, batch, persona)[:, -NEW:]
        alone = [greedy(net, handle, single(batch, row), persona)[0, -NEW:] for row in range(3)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("sampler", ["direct", "scr"])
def test_draws_belong_to_the_row_and_not_to_its_batch(net, library, batch, sampler):
    persona = pf.Persona(policies={"formal": 0.5, "warm": 0.5}, aggregator="linear")
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "sampler": sampler, "personas": persona}
    with pf.attach(net, library) as handle:
        together = net.generate(**batch, custom_generate=handle.generate, seeds=[7, 8, 9], **options)
        for row in range(3):
            alone = net.generate(**single(batch, row), custom_generate=handle.generate, seeds=[7 + row], **options)
            assert torch.equal(alone[0, -NEW:], together[row, -NEW:])
        again = net.generate(**batch, custom_generate=handle.generate, seed=1, **options)
        same = net.generate(**batch, custom_generate=handle.generate, seed=1, **options)
        other = net.generate(**batch, custom_generate=handle.generate, seed=2, **options)
    assert torch.equal(again, same) and not torch.equal(again, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_acts_on_decode_steps_under_the_cache(family, batch):
    net = tiny.model(family)
    library = tiny.library(net, masks=False)
    vector = library.vectors["creative"].directions
    expected = by_hand(net, single(batch, 0)["input_ids"], vector, (0, 1))
    with pf.attach(net, library) as handle:
        found = greedy(net, handle, single(batch, 0), pf.Persona(vectors={"creative": 1.0}))
    assert torch.equal(found, expected)
    assert not torch.equal(found, by_hand(net, single(batch, 0)["input_ids"], 0 * vector, (0, 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_is_adding_the_vector_at_the_block_output_to_the_last_bit(family, batch):
    net = tiny.model(family)
    library = tiny.library(net, masks=False)
    seen = {}

    def add(_, __, output):
        first = output[0] if isinstance(output, tuple) else output
        changed = first + library.vectors["creative"].directions[1]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    ids = single(batch, 0)["input_ids"]
    hook = anatomy(net).blocks[1].register_forward_hook(add)
    with torch.no_grad():
        seen["hand"] = net(ids).logits
    hook.remove()
    with pf.attach(net, library), torch.no_grad():
        seen["ours"] = net(ids, personas=[pf.Persona(vectors={"creative": 1.0}, blocks=(1,))]).logits
        seen["plain"] = net(ids).logits
    assert torch.equal(seen["hand"], seen["ours"])
    assert not torch.equal(seen["plain"], seen["ours"])


def test_the_second_vector_of_a_blend_changes_the_output(net, library, batch):
    with pf.attach(net, library) as handle:
        one = greedy(net, handle, batch, pf.Persona(vectors={"creative": 1.0}))
        both = greedy(net, handle, batch, pf.Persona(vectors={"creative": 1.0, "futurist": 1.0}))
        swapped = greedy(net, handle, batch, pf.Persona(vectors={"futurist": 1.0, "creative": 1.0}))
    assert not torch.equal(one, both)
    assert torch.equal(both, swapped)


def test_gradients_pass_through_steering(net, library, batch):
    with pf.attach(net, library):
        out = net(batch["input_ids"], personas=[pf.Persona(vectors={"creative": 1.0}), None, None]).logits
        out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_a_mask_is_the_model_with_masked_weights(net, library, batch):
    masked = copy.deepcopy(net)
    mask = library.masks["introvert"]
    with torch.no_grad():
        for path in mask.words:
            masked.get_submodule(path).weight.mul_(mask.dense(path))
    expected = masked.generate(**single(batch, 1), max_new_tokens=NEW, do_sample=False)
    with pf.attach(net, library) as handle:
        found = greedy(net, handle, single(batch, 1), pf.Persona(mask="introvert"))
        plain = greedy(net, handle, single(batch, 1), None)
    assert torch.equal(found, expected) and not torch.equal(found, plain)


def peft_model(net, library, tmp_path):
    peft = pytest.importorskip("peft")
    library.save_pretrained(tmp_path / "library")
    wrapped = None
    for name in library.policies:
        folder = tmp_path / "library" / "policies" / name
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(net, folder, adapter_name=name)
        else:
            wrapped.load_adapter(folder, adapter_name=name)
    return wrapped.eval()


@pytest.mark.parametrize("name", ["formal", "warm"])
def test_one_policy_at_weight_one_is_that_policy_and_at_zero_the_reference(library, batch, tmp_path, name):
    wrapped = peft_model(tiny.model(), library, tmp_path)
    wrapped.set_adapter(name)
    expected = wrapped.generate(**single(batch, 0), max_new_tokens=NEW, do_sample=False)
    net = tiny.model()
    plain = net.generate(**single(batch, 0), max_new_tokens=NEW, do_sample=False)
    with pf.attach(net, library) as handle:
        for rule in ("geometric", "linear"):
            one = greedy(net, handle, single(batch, 0), pf.Persona(policies={name: 1.0}, aggregator=rule), min_p=0.0)
            assert torch.equal(one, expected)
        zero = greedy(net, handle, single(batch, 0), pf.Persona(policies={name: 0.0}), min_p=0.0)
        assert torch.equal(zero, plain)
    assert not torch.equal(expected, plain)


def test_a_peft_wrapped_model_takes_personas(library, batch, tmp_path):
    wrapped = peft_model(tiny.model(), library, tmp_path)
    wrapped.set_adapter("warm")
    plain = wrapped.generate(**single(batch, 0), max_new_tokens=NEW, do_sample=False)
    vectors = pf.PersonaLibrary(library.shape)
    vectors.add_vector("creative", library.vectors["creative"])
    with pf.attach(wrapped, vectors) as handle:
        steered = greedy(wrapped, handle, single(batch, 0), pf.Persona(vectors={"creative": 3.0}))
        none = greedy(wrapped, handle, single(batch, 0), None)
    assert torch.equal(none, plain) and not torch.equal(steered, plain)


def test_merge_is_the_sum_of_the_weight_updates(net, library, batch):
    merged = copy.deepcopy(net)
    weights = {"formal": 0.8, "warm": 0.5}
    with torch.no_grad():
        for name, weight in weights.items():
            for path, f in library.policies[name].factors.items():
                merged.get_submodule(path).weight.add_(weight * f.scale * f.b @ f.a)
    expected = merged.generate(**single(batch, 0), max_new_tokens=NEW, do_sample=False)
    with pf.attach(net, library) as handle:
        found = greedy(net, handle, single(batch, 0), pf.Persona(policies=weights), sampler="merge")
        # More merges than the banks hold: the oldest leave, and the first still comes out right.
        for step in range(12):
            greedy(net, handle, single(batch, 0), pf.Persona(policies={"formal": 0.1 * step + 0.05}), sampler="merge")
        again = greedy(net, handle, single(batch, 0), pf.Persona(policies=weights), sampler="merge")
    assert torch.equal(found, expected) and torch.equal(again, expected)


def test_a_prompt_persona_of_weight_one_is_the_model_under_that_system_prompt(net):
    tok = tiny.tokenizer()
    user = {"role": "user", "content": "what is this"}
    text = "you are a pirate"
    plain = tok.apply_chat_template([user], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    under = tok.apply_chat_template(
        [{"role": "system", "content": text}, user], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = net.generate(**under, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    with pf.attach(net, tokenizer=tok) as handle:
        found = greedy(net, handle, plain, pf.Persona(prompts={text: 1.0}), min_p=0.0)[:, -NEW:]
        two = greedy(net, handle, plain, pf.Persona(prompts={text: 0.7, "you are a calm lawyer": 0.3}))
        assert two.shape == (1, plain["input_ids"].shape[1] + NEW)
        with pytest.raises(pf.PersonafastError, match="chat template begins"):
            greedy(net, handle, under, pf.Persona(prompts={text: 1.0}))
    assert torch.equal(found, expected)


def test_the_contract_example_runs_with_the_models_own_tokenizer(net, library, tmp_path):
    from transformers import AutoModelForCausalLM

    tok = tiny.tokenizer()
    net.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    library.save_pretrained(tmp_path / "personas")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    library = pf.PersonaLibrary.from_pretrained(tmp_path / "personas")
    tok.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in ("what is this", "sea", "law .", "ship court", "yes")]
    batch = tok.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with pf.attach(net, library) as personas:
        out = net.generate(
            **batch,
            custom_generate=personas.generate,
            max_new_tokens=NEW,
            personas=[
                pf.Persona(prompts={"you are a pirate": 0.7, "you are a lawyer": 0.3}),
                pf.Persona(vectors={"creative": 1.0, "futurist": 0.5}),
                pf.Persona(mask="introvert"),
                pf.Persona(policies={"formal": 1.0, "warm": 1.0}),
                None,
            ],
        )
    assert out.shape == (5, batch["input_ids"].shape[1] + NEW)


def test_detach_restores_the_model_bit_for_bit(net, library, batch):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        logits = net(**batch).logits
    handle = pf.attach(net, library)
    assert list(net.state_dict()) == list(before)
    greedy(net, handle, batch, [PERSONAS[1], PERSONAS[2], PERSONAS[3]])
    greedy(net, handle, batch, PERSONAS[3], sampler="merge")
    handle.detach()
    handle.detach()
    with torch.no_grad():
        assert torch.equal(net(**batch).logits, logits)
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for module in net.modules():
        assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(pf.PersonafastError, match="detached"):
        greedy(net, handle, batch, None)


def test_a_patched_forward_of_somebody_else_survives(net, library):
    linear = anatomy(net).linears["model.layers.0.self_attn.q_proj"]
    original = linear.forward

    def other(x):
        return original(x)

    linear.forward = other
    with pf.attach(net, library):
        assert linear.forward is not other
    assert linear.forward is other


def test_using_steers_stock_generate_with_beams(net, library, batch):
    row = single(batch, 0)
    with pf.attach(net, library) as handle:
        plain = net.generate(**row, max_new_tokens=NEW, num_beams=3, do_sample=False)
        with handle.using([pf.Persona(vectors={"creative": 1.0})]):
            steered = net.generate(**row, max_new_tokens=NEW, num_beams=3, do_sample=False)
        after = net.generate(**row, max_new_tokens=NEW, num_beams=3, do_sample=False)
    assert torch.equal(plain, after) and not torch.equal(plain, steered)


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("sampler", ["direct", "scr"])
def test_streaming_gives_the_prompt_and_then_every_committed_token(net, library, batch, sampler):
    recorder = Recorder()
    row = single(batch, 0)
    with pf.attach(net, library) as handle:
        out = net.generate(
            **row,
            max_new_tokens=NEW,
            do_sample=True,
            top_k=0,
            seed=3,
            sampler=sampler,
            personas=pf.Persona(policies={"formal": 1.0}),
            custom_generate=handle.bind(streamer=recorder),
        )
    assert torch.equal(recorder.seen[0], row["input_ids"]) and recorder.ended
    assert torch.equal(torch.cat(recorder.seen[1:]), out[0, row["input_ids"].shape[1] :])


@pytest.mark.parametrize("sampler", ["direct", "scr"])
def test_stop_strings_end_their_own_row_only(net, library, batch, sampler):
    tok = tiny.tokenizer()
    options = {
        "max_new_tokens": NEW,
        "do_sample": True,
        "top_k": 0,
        "seed": 3,
        "sampler": sampler,
        "personas": pf.Persona(policies={"formal": 1.0}),
    }
    with pf.attach(net, library, tokenizer=tok) as handle:
        free = net.generate(**batch, custom_generate=handle.generate, **options)[:, -NEW:]
        stop = tok.convert_ids_to_tokens(int(free[0, 4]))
        out = net.generate(**batch, custom_generate=handle.generate, stop_strings=[stop], **options)[:, 7:]
    for row in range(3):
        words = tok.convert_ids_to_tokens(free[row].tolist())
        end = words.index(stop) + 1 if stop in words else NEW
        assert out[row, :end].tolist() == free[row, :end].tolist()
        assert (out[row, end:] == 0).all()


def test_eos_ends_a_row_and_pads_it(net, library, batch):
    with pf.attach(net, library) as handle:
        free = greedy(net, handle, batch, None)[:, 7:]
        out = greedy(net, handle, batch, None, eos_token_id=int(free[1, 2]))[:, 7:]
    first = (free[1] == free[1, 2]).nonzero()[0, 0]
    assert out[1, : first + 1].tolist() == free[1, : first + 1].tolist()
    assert (out[1, first + 1 :] == 0).all()


def test_num_return_sequences_repeats_personas_and_a_dict_carries_statistics(net, library, batch):
    with pf.attach(net, library) as handle:
        out = net.generate(
            **batch,
            max_new_tokens=NEW,
            do_sample=True,
            num_return_sequences=2,
            custom_generate=handle.generate,
            personas=[None, PERSONAS[3], None],
            return_dict_in_generate=True,
        )
    assert out.sequences.shape == (6, 7 + NEW)
    assert out.stats.tokens == 6 * NEW and out.stats.forwards == (6 + 2 * 2) * NEW


def test_processors_act_on_the_target(net, library, batch):
    with pf.attach(net, library) as handle:
        out = greedy(net, handle, batch, PERSONAS[3])[:, 7:]
        banned = [[int(token)] for token in out[:, 0].unique()]
        without = greedy(net, handle, batch, PERSONAS[3], bad_words_ids=banned)[:, 7:]
    assert not torch.isin(without, torch.tensor(banned).flatten()).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_run(batch, dtype):
    net = tiny.model().to(dtype)
    with pf.attach(net, tiny.library(net)) as handle:
        out = greedy(net, handle, batch, PERSONAS[5])
    assert out.shape == (3, 7 + NEW)


@pytest.mark.parametrize("sampler", ["direct", "scr", "merge"])
def test_the_default_dtype_is_nobodys_business(net, library, batch, sampler):
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "seed": 1, "sampler": sampler}
    persona = pf.Persona(policies={"formal": 0.5, "warm": 0.4}, vectors={"creative": 1.0})
    with pf.attach(net, library) as handle:
        expected = net.generate(**batch, custom_generate=handle.generate, personas=persona, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pf.attach(net, library) as handle:
            found = net.generate(**batch, custom_generate=handle.generate, personas=persona, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def bad(message, **call):
    return pytest.param(message, call, id=message)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        bad("no vector 'nobody'", personas=pf.Persona(vectors={"nobody": 1.0})),
        bad("no policy 'nobody'", personas=pf.Persona(policies={"nobody": 1.0})),
        bad("no mask 'nobody'", personas=pf.Persona(mask="nobody")),
        bad("2 given for 3 rows", personas=[None, None]),
        bad("expected Persona", personas=["formal", None, None]),
        bad("sampler: 'magic'", sampler="magic"),
        bad("min_p: 2", min_p=2.0),
        bad("beam search", num_beams=2),
        bad("tokenizer: none given", stop_strings=["x"]),
        bad("seeds: 1 given", seeds=[1], do_sample=True),
        bad("'scr' needs policies", sampler="scr", do_sample=True, top_k=0),
        bad("TopKLogitsWarper cannot act", sampler="scr", do_sample=True, top_k=5, personas=PERSONAS[3]),
        bad("prompts have none", sampler="merge", personas=pf.Persona(prompts={"x": 1.0})),
        bad("tokenizer: none given", personas=pf.Persona(prompts={"x": 1.0})),
    ],
)
def test_a_bad_call_is_refused_by_name(net, library, batch, message, call):
    with pf.attach(net, library) as handle, pytest.raises(pf.PersonafastError, match=message) as caught:
        net.generate(**{**batch, "max_new_tokens": 3, "custom_generate": handle.generate, **call})
    assert "\n" not in str(caught.value)


def test_attaching_twice_and_foreign_libraries_are_refused_and_nothing_is_patched(net, library):
    with pf.attach(net, library), pytest.raises(pf.PersonafastError, match="attached already"):
        pf.attach(net, library)
    foreign = pf.PersonaLibrary()
    foreign.add_vector("wide", torch.ones(tiny.BLOCKS, 2 * tiny.HIDDEN))
    for attempt in (foreign, tiny.library(tiny.model("gpt2"), masks=False)):
        with pytest.raises(pf.PersonafastError):
            pf.attach(net, attempt)
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(pf.UnsupportedModelError, match="Linear"):
        pf.attach(torch.nn.Linear(2, 2))


def test_more_blends_than_the_bank_holds(net, library, batch):
    personas = [pf.Persona(vectors={"creative": float(c)}) for c in (1, 2, 3)]
    with pf.attach(net, library, max_personas=2) as handle:
        with pytest.raises(pf.PersonafastError, match="max_personas"):
            greedy(net, handle, batch, personas)
        rows = [greedy(net, handle, single(batch, 0), persona) for persona in personas]
        again = greedy(net, handle, single(batch, 0), personas[0])
    assert torch.equal(rows[0], again) and not torch.equal(rows[0], rows[2])


def test_a_vector_replaced_in_the_library_is_used_at_once(net, library, batch):
    persona = pf.Persona(vectors={"creative": 1.0})
    with pf.attach(net, library) as handle:
        old = greedy(net, handle, batch, persona)
        library.add_vector("creative", library.vectors["futurist"])
        new = greedy(net, handle, batch, persona)
        wanted = greedy(net, handle, batch, pf.Persona(vectors={"futurist": 1.0}))
    assert torch.equal(new, wanted) and not torch.equal(old, new)


@pytest.mark.parametrize("rule", ["geometric", "linear"])
def test_weights_that_sum_to_one_do_not_run_the_reference(net, library, batch, rule):
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "seed": 1, "custom_generate": None}
    with pf.attach(net, library) as handle:
        options["custom_generate"] = handle.generate
        persona = pf.Persona(policies={"formal": 0.6, "warm": 0.4}, aggregator=rule)
        # A row that needs the reference beside two that do not.
        mixed = [persona, pf.Persona(policies={"formal": 1.0, "warm": 1.0}), persona]
        alone = net.generate(**batch, personas=persona, return_dict_in_generate=True, **options)
        beside = net.generate(**batch, personas=mixed, return_dict_in_generate=True, **options)
    assert alone.stats.forwards == 3 * 2 * NEW and beside.stats.forwards == 7 * NEW
    assert torch.equal(alone.sequences[[0, 2]], beside.sequences[[0, 2]])


def chat_tokenizer(template):
    """A byte-level BPE tokenizer, whose first user token depends on what stands before it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(["where is the ship ? you are a pirate . where where ship"] * 20, vocab_size=400)
    found = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, bos_token="<s>", eos_token="</s>")
    found.chat_template = template
    return found


ONE_TURN = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\\n\\n' %}{% set loop_messages = "
    "messages[1:] %}{% else %}{% set s = '' %}{% set loop_messages = messages %}{% endif %}{{ bos_token }}"
    "{% for m in loop_messages %}{{ '[INST] ' + (s if loop.first else '') + m['content'] + '[/INST]' }}{% endfor %}"
)
OWN_TURN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{{ '<|assistant|>\\n' }}"
)
NO_SYSTEM = "{{ bos_token }}{% for m in messages if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}{% endfor %}"


@pytest.mark.parametrize("template", [ONE_TURN, OWN_TURN])
@pytest.mark.parametrize("question", ["where is the ship ?", "x", "yes", "\n\nwhere ?", "Where is x?"])
def test_system_texts_are_written_as_the_template_writes_them(template, question):
    from personafast.density.prompting import SystemPrompts
    from personafast.models.reading import chat_ids

    tok = chat_tokenizer(template)
    prompts = SystemPrompts(tok)
    user = {"role": "user", "content": question}
    for text in ("you are a pirate .", "you are a pirate", "x"):
        wanted = tok.decode(chat_ids(tok, [{"role": "system", "content": text}, user]))
        assert tok.decode(prompts.insert(chat_ids(tok, [user]), text)) == wanted


def test_a_template_without_system_messages_is_refused():
    from personafast.density.prompting import SystemPrompts

    tok = chat_tokenizer(NO_SYSTEM)
    with pytest.raises(pf.PersonafastError, match="leaves system messages out"):
        SystemPrompts(tok).insert(tok("[where]")["input_ids"], "you are a pirate")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("sampler", ["direct", "scr"])
def test_a_peft_wrapped_model_keeps_the_positions_of_padded_rows(family, sampler, batch, tmp_path):
    peft = pytest.importorskip("peft")
    net = tiny.model(family)
    library = tiny.library(net, masks=False)
    target = ["c_attn"] if family == "gpt2" else ["q_proj"]
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=target, fan_in_fan_out=family == "gpt2")).eval()
    persona = pf.Persona(policies={"warm": 1.0} if family == "llama" else {"formal": 0.1})
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "sampler": sampler, "personas": persona}
    with pf.attach(wrapped, library) as handle:
        options["custom_generate"] = handle.generate
        together = wrapped.generate(**batch, seeds=[7, 8, 9], **options)
        for row in range(3):
            alone = wrapped.generate(**single(batch, row), seeds=[7 + row], **options)
            assert torch.equal(alone[0, -NEW:], together[row, -NEW:])


def test_a_context_may_be_filled_to_its_last_position_and_not_beyond():
    net = tiny.model("gpt2")
    library = tiny.library(net, masks=False)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    options = {"do_sample": True, "top_k": 0, "personas": pf.Persona(policies={"formal": 0.5})}
    with pf.attach(net, library) as handle:
        options["custom_generate"] = handle.generate
        for seed in range(4):
            out = net.generate(ids, max_new_tokens=60, sampler="scr", seed=seed, **options)
            assert out.shape == (2, 64)
        with pytest.raises(pf.PersonafastError, match="exceed the 64 positions of this model; ask for at most 60"):
            net.generate(ids, max_new_tokens=61, **options)


def test_min_p_of_a_row_without_ratios_is_that_of_stock_generate(net, batch):
    """Stock min-p looks at the probabilities after the temperature."""
    options = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "temperature": 3.0, "min_p": 0.3}
    row = single(batch, 0)
    torch.manual_seed(0)
    stock = set(net.generate(**row, num_return_sequences=2000, **options)[:, -1].tolist())
    with pf.attach(net) as handle:
        ours = net.generate(**row, num_return_sequences=2000, custom_generate=handle.generate, **options)[:, -1]
    assert len(stock) > 3 and set(ours.tolist()) == stock


def test_merge_has_the_default_min_p_of_the_policies_it_merges(net, library, batch):
    row = single(batch, 0)
    options = {
        "max_new_tokens": 1,
        "do_sample": True,
        "top_k": 0,
        "num_return_sequences": 2000,
        "sampler": "merge",
        "personas": pf.Persona(policies={"formal": 1.0}),
    }
    with pf.attach(net, library) as handle:
        options["custom_generate"] = handle.generate
        default, same, none = (
            net.generate(**row, seed=1, **options, **extra)[:, -1] for extra in ({}, {"min_p": 0.05}, {"min_p": 0.0})
        )
    assert torch.equal(default, same) and not torch.equal(default, none)


def test_a_library_that_changes_is_noticed(net, library, batch):
    with pf.attach(net, library) as handle:
        old = greedy(net, handle, batch, pf.Persona(policies={"formal": 1.0}))
        library.add_policy("new", tiny.policy(net, 9))
        library.add_mask("other", library.masks["introvert"])
        new = greedy(net, handle, batch, pf.Persona(policies={"new": 1.0}))
        assert greedy(net, handle, batch, pf.Persona(mask="other")).equal(
            greedy(net, handle, batch, pf.Persona(mask="introvert"))
        )
        library.add_policy("formal", tiny.policy(net, 9))
        replaced = greedy(net, handle, batch, pf.Persona(policies={"formal": 1.0}))
        library.add_policy("foreign", tiny.policy(tiny.model("gpt2"), 1))
        with pytest.raises(pf.PersonafastError, match="which the model lacks"):
            greedy(net, handle, batch, None)
    assert torch.equal(new, replaced) and not torch.equal(old, new)


@pytest.mark.parametrize("sample", [True, False])
def test_a_target_that_is_no_number_is_refused(net, library, batch, sample):
    with pf.attach(net, library) as handle, pytest.raises(pf.PersonafastError, match="row 0 of the batch"):
        net.generate(
            **batch,
            max_new_tokens=2,
            do_sample=sample,
            custom_generate=handle.generate,
            seed=1,
            personas=pf.Persona(vectors={"creative": 3e38}),
        )


def test_a_blend_that_fails_leaves_the_bank_as_it_was(net, library, batch):
    row = single(batch, 0)
    personas = [pf.Persona(vectors={name: 5.0}) for name in ("creative", "futurist")]
    with pf.attach(net, library, max_personas=2) as handle:
        expected = [greedy(net, handle, row, persona) for persona in personas]
        with pytest.raises(pf.PersonafastError, match="blocks"):
            greedy(net, handle, row, pf.Persona(vectors={"creative": 1.0}, blocks=[99]))
        third = greedy(net, handle, row, pf.Persona(vectors={"creative": -5.0}))
        again = [greedy(net, handle, row, persona) for persona in personas]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert not torch.equal(third, again[0]) and not torch.equal(third, again[1])


def test_a_nested_call_does_not_take_the_slot_of_the_rows_in_force(net, library, batch):
    with pf.attach(net, library, max_personas=1) as handle, handle.using([pf.Persona(vectors={"creative": 1.0})]):
        with pytest.raises(pf.PersonafastError, match="max_personas"):
            net(single(batch, 0)["input_ids"], personas=[pf.Persona(vectors={"futurist": 1.0})])


def test_linears_that_flatten_rows_and_tokens_are_understood(batch):
    """OPT's MLP sees [rows * tokens, features]."""
    import transformers as t

    torch.manual_seed(0)
    net = t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
        )
    ).eval()
    net.generation_config.eos_token_id = None
    with pf.attach(net, tiny.library(net)) as handle:
        together = greedy(net, handle, batch, [None, PERSONAS[5], PERSONAS[3]])[:, -NEW:]
        for row, persona in enumerate([None, PERSONAS[5], PERSONAS[3]]):
            assert torch.equal(greedy(net, handle, single(batch, row), persona)[0, -NEW:], together[row])


def test_using_a_detached_handle_is_refused(net, library):
    handle = pf.attach(net, library)
    handle.detach()
    with pytest.raises(pf.PersonafastError, match="detached"), handle.using([None]):
        pass
