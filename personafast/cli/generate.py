"""`personafast generate`: speak with a persona."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personafast.cli.options import assignments, finite, read_prompts, steered
from personafast.cli.progress import progress_bar
from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.persona import Persona

SAMPLERS = ("direct", "verify", "block", "mixture", "token_rs", "scr", "merge", "auto")
# What a name on the command line can mean; a model or a Drafter takes Python.
DRAFTS = ("auto", "reference", "merge", "ngram")

# Options of steering, and what they are when nobody gives them.
_STEADY = {"operation": "add", "range": None, "normalize": "none", "positions": "all", "schedule": "constant"}

EXAMPLE = """\
**Two personas, no training, any instruct model:**

`personafast generate --model path/to/instruct-model --prompt-persona "You are a pirate.=0.7"
--prompt-persona "You are a lawyer.=0.3" --prompt "May I park here?"`

**Two trained policies of the built-in model, over a file that may be interrupted and resumed:**

`personafast generate --policy formal=1 --policy warm=1 --prompts-file questions.txt --output answers.jsonl`
"""


def generate(
    prompt: Annotated[str | None, typer.Option(help="What the user says.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help='One prompt a line, or a .jsonl file with {"prompt": ...} a line.')
    ] = None,
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, hub name, or `zoo`, the small built-in model.")
    ] = "zoo",
    library: Annotated[
        Path | None, typer.Option(help="Folder of a PersonaLibrary; with `zoo`, its own by default.")
    ] = None,
    vector: Annotated[
        list[str] | None, typer.Option(metavar="NAME=COEF", help="Add a persona vector; repeat to blend.")
    ] = None,
    operation: Annotated[
        str,
        typer.Option(
            help="What the blend of vectors does: `add`; `ablate` takes the direction out; `clamp` holds the "
            "coordinate along it in `--range`; `norm_preserving` adds and keeps the norm; `replace`."
        ),
    ] = "add",
    value_range: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="LOW:HIGH",
            help="Of `--operation clamp`; an end may be left out, one number is a target.",
        ),
    ] = None,
    normalize: Annotated[
        str, typer.Option(help="Bring vectors to one length before they are summed: `none`, `unit` or `match`.")
    ] = "none",
    positions: Annotated[
        str,
        typer.Option(
            help="Tokens that vectors act at: `all`, `prompt`, `response`, `last` (of the prompt), or spans like "
            "`3:8,-2:0`, a negative start counting from the prompt's end."
        ),
    ] = "all",
    schedule: Annotated[
        str,
        typer.Option(
            help="Strength over the reply: `constant`, `first:TOKENS`, or `linear:STEPS[:START:END]`, by default from "
            "1 to 0."
        ),
    ] = "constant",
    mask: Annotated[str | None, typer.Option(metavar="NAME", help="Speak through this persona mask.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WEIGHT", help="Weigh in a LoRA policy; 1 is full strength; repeat to blend."),
    ] = None,
    prompt_persona: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT=WEIGHT", help="Weigh in the model under this system prompt; repeat to blend."),
    ] = None,
    aggregator: Annotated[
        str,
        typer.Option(
            help="`geometric` blends; `linear` is a mixture that speaks as one persona at a time; `harmonic`, `power`, "
            "`jensen_shannon`, `min`, `max` lie between and beyond."
        ),
    ] = "geometric",
    power: Annotated[float, typer.Option(help="Exponent of `--aggregator power`.")] = 1.0,
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A policy that takes the reference's place in front of the ratios."),
    ] = None,
    sampler: Annotated[
        str,
        typer.Option(
            help="`direct`: exact, token by token. `verify`, `block`: exact, from drafts that are scored at once. "
            "`mixture`: the linear rule, one policy a chunk. `token_rs`: exact rejection. `scr`: chunks, as published, "
            "approximate. `merge`: policies merged into one set of weights, the cheap baseline. `auto` chooses."
        ),
    ] = "direct",
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens drafted, spoken or proposed at once; by default the sampler's own."),
    ] = None,
    draft: Annotated[
        str, typer.Option(help="What `verify` and `block` draft with: `auto`, `reference`, `merge` or `ngram`.")
    ] = "auto",
    carry: Annotated[
        bool, typer.Option("--carry", help="Weigh policies by their ratios over the whole text so far.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt of the conversation itself.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Divides the logits of the blended target.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens of at least this share of the likeliest one's probability; 0 keeps all.")
    ] = 0.05,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of drawing.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End a reply at this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same replies.")] = 0,
    dtype: Annotated[str, typer.Option(help="`auto`, `float32`, `bfloat16` or `float16`.")] = "auto",
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 32,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print tokens as they come; on for a single --prompt.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Append answers to this .jsonl file, skipping prompts it already answers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object an answer.")] = False,
) -> None:
    """Answer prompts as a blend of personas.

    A persona is any mix of vectors, one mask, LoRA policies and prompt personas; without any, the plain model answers.
    """
    from personafast.handle import attach
    from personafast.library import PersonaLibrary
    from personafast.persona import Persona

    finite("--temperature", temperature, low=0.0)
    finite("--min-p", min_p, low=0.0, high=1.0)
    if temperature == 0 and not greedy:
        raise PersonafastError("--temperature 0: draws nothing; use --greedy for the likeliest token")
    if sampler not in SAMPLERS:
        raise PersonafastError(f"--sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if draft not in DRAFTS:
        raise PersonafastError(f"--draft {draft!r}: choose one of {', '.join(DRAFTS)}")
    for text in stop or []:
        if not text:
            raise PersonafastError("--stop '': the text is empty; give the text that ends a reply")
    prompts = _prompts(prompt, prompts_file)
    streaming = _streaming(stream, single=prompts_file is None, to_machine=as_json or output is not None)
    vectors = assignments("--vector", vector or [])
    parts: dict[str, Any] = {
        "vectors": vectors,
        "mask": mask,
        "policies": assignments("--policy", policy or []),
        "prompts": assignments("--prompt-persona", prompt_persona or []),
    }
    steps = {"operation": operation, "range": value_range, "normalize": normalize}
    steps |= {"positions": positions, "schedule": schedule}
    steps = {name: value for name, value in steps.items() if value != _STEADY[name]}
    if steps and not vectors:
        raise PersonafastError(f"--{next(iter(steps))}: says what vectors do; give --vector NAME=COEF")
    given = {**parts, **steered(vectors, steps)} if steps else parts
    persona = Persona(**given, aggregator=aggregator, p=power, base=base)
    if system is not None and any(persona.prompts.values()):
        raise PersonafastError(
            "--system: a --prompt-persona writes the system message itself; leave --system out, "
            "or put its text into every --prompt-persona"
        )
    settings = {
        "model": model,
        "library": None if library is None else str(library),
        "persona": {**parts, **steps, "aggregator": aggregator, "p": power, "base": base},
        "sampler": sampler,
        "chunk": chunk,
        "draft": draft,
        "carry": carry,
        "system": system,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "min_p": min_p,
        "greedy": greedy,
        "stop": stop or [],
        "seed": seed,
        "dtype": dtype,
    }
    answers, todo = None, list(range(len(prompts)))
    if output is not None:
        from personafast.cli.answers import AnswerFile

        answers = AnswerFile(output, settings)
        todo = answers.missing(prompts)
        if len(todo) < len(prompts):
            typer.echo(f"{output}: {len(prompts) - len(todo)} of {len(prompts)} prompts already answered", err=True)
    named = PersonaLibrary.from_pretrained(library) if library is not None else None

    from personafast.cli.loading import load_model
    from personafast.density.draws import row_seed

    network, tokenizer, own = load_model(model, dtype, device)
    sampling: dict[str, Any] = {
        "sampler": sampler,
        "chunk": chunk,
        "draft": draft,
        "carry": carry,
        "max_new_tokens": max_new_tokens,
        "do_sample": not greedy,
        "min_p": min_p,
        "top_k": 0,
        **({} if greedy else {"temperature": temperature}),
    }
    speaker = persona if any(parts.values()) or base is not None else None
    with attach(network, named or own, tokenizer=tokenizer) as personas, progress_bar() as bar:
        task = bar.add_task("answering", total=len(prompts), completed=len(prompts) - len(todo), visible=not streaming)
        for first in range(0, len(todo), batch_size):
            places = todo[first : first + batch_size]
            # A row's draws follow from its place in the file, so that neither batch size nor a restart changes them.
            sampling["seeds"] = [row_seed(seed, place) for place in places]
            batch = [prompts[place] for place in places]
            records = _answer(network, tokenizer, personas, speaker, batch, system, sampling, settings, streaming)
            if answers is not None:
                answers.append(records)
            elif as_json:
                for record in records:
                    typer.echo(json.dumps(record, ensure_ascii=False))
            elif not streaming:
                for record in records:
                    typer.echo(record["reply"] if len(prompts) == 1 else f"> {record['prompt']}\n{record['reply']}\n")
            bar.advance(task, len(batch))


def _prompts(prompt: str | None, prompts_file: Path | None) -> list[str]:
    if (prompt is None) == (prompts_file is None):
        raise PersonafastError("--prompt: give either --prompt TEXT or --prompts-file FILE")
    if prompts_file is not None:
        return read_prompts(prompts_file)
    if prompt is None or not prompt.strip():
        raise PersonafastError("--prompt: the prompt is empty; say what the user asks")
    return [prompt]


def _streaming(asked: bool | None, *, single: bool, to_machine: bool) -> bool:
    possible = single and not to_machine
    if asked and not possible:
        raise PersonafastError("--stream: works for one --prompt without --json or --output; leave one of them out")
    return possible if asked is None else asked


def _answer(
    network: Any,
    tokenizer: Any,
    personas: Any,
    speaker: Persona | None,
    prompts: list[str],
    system: str | None,
    sampling: dict[str, Any],
    settings: dict[str, Any],
    streaming: bool,
) -> list[dict[str, Any]]:
    """Answer one batch; a record a prompt."""
    from personafast.evaluate.chat import encode

    inputs = encode(tokenizer, prompts, network.device, system)
    # transformers' generate keeps a streamer to itself and refuses stop strings, so both are bound to the callable.
    bound: dict[str, Any] = {"stop_strings": settings["stop"] or None}
    if streaming:
        from transformers import TextStreamer

        bound["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    began = time.perf_counter()
    out = network.generate(
        **inputs,
        custom_generate=personas.bind(**bound),
        personas=[speaker] * len(prompts),
        return_dict_in_generate=True,
        **sampling,
    )
    seconds = time.perf_counter() - began
    replies = tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    stats = {
        "tokens_per_s": out.stats.tokens / seconds,
        "forwards_per_token": out.stats.forwards_per_token,
        "tokens_per_round": out.stats.tokens_per_round,
        "acceptance": out.stats.acceptance,
        "notes": out.stats.notes,
    }
    return [
        {"prompt": prompt, "reply": reply.strip(), "settings": settings, "stats": stats}
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
