"""Decoding end to end: tokens a second of Llamas of half a billion random parameters, against unpatched transformers.

A sample is the difference between a long and a short generation, divided by the tokens between them: the prompt and the
set-up are in both and cancel.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import personafast as pf
from benchmarks import machine
from benchmarks.bandwidth import reader
from benchmarks.case import Absent
from benchmarks.cases.shapes import masked
from benchmarks.check import CheckFailed
from benchmarks.measure import READ, Measurement, rounded
from benchmarks.sampler import Sample, interleave, paired, spread
from personafast.masks.mask import PersonaMask
from personafast.models.anatomy import anatomy, linear_features

PROMPT, SHORT = 16, 2
HF = "unpatched transformers"
# Enough to tell a wrong kernel or a mask in the wrong row; every one of them costs passes in float32.
CHECKED_TOKENS, CHECKED_ROWS = 6, (0, 3, 7)
# Generates this many new tokens and gives the sequences back, [B, PROMPT + tokens].
Generate = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A Llama: the name of what it is shaped like, and its configuration."""

    name: str
    config: Mapping[str, Any]


SHAPES = (
    Shape(
        "qwen2.5-0.5b",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    Shape(
        "llama-18x1536",
        {
            "vocab_size": 32000,
            "hidden_size": 1536,
            "intermediate_size": 4096,
            "num_hidden_layers": 18,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
    ),
)


@dataclass(frozen=True)
class Runner:
    """A way to decode.

    Attributes:
        generate: decodes.
        traffic: bytes of weights and masks that one step of all its rows has to read.
        masks: the mask of each row, None for the whole model.
        goal: how many times faster than the baseline it has to be.
    """

    generate: Generate
    traffic: int
    masks: tuple[PersonaMask | None, ...]
    goal: float | None = None


@dataclass(frozen=True)
class DecodeCase:
    """One model shape and what is decoded with it.

    Attributes:
        name: what `-k` selects by.
        shape: the model.
        contenders: names, the first of which is the baseline.
        build: makes the runners, in the order of `contenders`, or the reason why one is absent; what has to be undone
            goes on the stack.
        rows: rows decoded at once.
        copies: masked copies of the model that the case holds.
    """

    name: str
    shape: Shape
    contenders: tuple[str, ...]
    build: Callable[[Any, torch.Tensor, contextlib.ExitStack], Sequence[Runner | Absent]]
    rows: int
    copies: int = 0

    def needed_memory(self) -> int:
        """Bytes: the model, one in fp32 to check with, the copies, and room to build the next one in."""
        return 2 * parameters(self.shape) * (1 + 2 + self.copies + 1)


def parameters(shape: Shape) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _llama(shape).parameters())


def _llama(shape: Shape) -> Any:
    import transformers

    config = transformers.LlamaConfig(**shape.config, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


_made: dict[str, Any] = {}


def make_model(shape: Shape) -> Any:
    """The model of `shape`, made once: nobody may change its weights."""
    if shape.name not in _made:
        _made.clear()
        _made[shape.name] = drawn(shape)
    return _made[shape.name]


def drawn(shape: Shape) -> Any:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return _llama(shape).eval()
    finally:
        torch.set_default_dtype(default)


def sharing(model: Any) -> Any:
    """Another model object with the same parameters, so that one can be patched beside the other."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def random_mask(model: Any, seed: int) -> PersonaMask:
    """Keeps half of the weights of every linear in the blocks."""
    generator = torch.Generator().manual_seed(seed)
    words, features = {}, {}
    for path, linear in anatomy(model).linears.items():
        outputs, features[path] = linear_features(linear)
        shape = (outputs, -(-features[path] // 32))
        words[path] = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    return PersonaMask(words, features)


def masked_copy(model: Any, mask: PersonaMask) -> Any:
    """`model` with the mask multiplied into weights of its own; what is outside the blocks is shared."""
    twin = sharing(model)
    for path, linear in anatomy(twin).linears.items():
        linear.weight = nn.Parameter(masked(linear.weight.detach(), mask.words[path]), requires_grad=False)
    return twin


def model_bytes(model: Any) -> int:
    """Bytes of weights that a step reads: each once, the head among them (it is tied to the embedding)."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def linear_bytes(model: Any) -> int:
    """Bytes of the weights that masks act on."""
    return sum(2 * linear.weight.numel() for linear in anatomy(model).linears.values())


def generator(model: Any, ids: torch.Tensor, **options: Any) -> Generate:
    return lambda tokens: model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)


def one_row(model: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> list[Runner | Absent]:
    """Batch 1: unpatched, attached without a persona in both loops, and one compressed mask."""
    whole = model_bytes(model)
    attached = sharing(model)
    handle = stack.enter_context(pf.attach(attached, pf.PersonaLibrary()))
    return [
        Runner(generator(model, ids), whole, (None,)),
        Runner(generator(attached, ids, custom_generate=handle.generate), whole, (None,), goal=1.6),
        Runner(generator(attached, ids), whole, (None,), goal=1.6),
        _compressed(model, ids, stack),
    ]


def _compressed(model: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> Runner | Absent:
    if "keep_dense" not in inspect.signature(pf.attach).parameters:
        return Absent("personafast.attach has no keep_dense yet")
    mask = random_mask(model, 0)
    twin = sharing(model)
    library = pf.PersonaLibrary()
    library.add_mask("half", mask)
    handle = pf.attach(twin, library, keep_dense=False)
    # Nine bits where sixteen were.
    traffic = model_bytes(model) - linear_bytes(model) * 7 // 16
    generate = generator(twin, ids, custom_generate=handle.generate, personas=pf.Persona(mask="half"))
    return Runner(generate, traffic, (mask,), goal=2.4)


def eight_rows(model: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> list[Runner | Absent]:
    """Eight rows with eight masks: a masked copy of the model for each, one after the other; and one batch."""
    masks = [random_mask(model, seed) for seed in range(ids.shape[0])]
    copies = [masked_copy(model, mask) for mask in masks]
    library = pf.PersonaLibrary()
    for index, mask in enumerate(masks):
        library.add_mask(f"mask{index}", mask)
    personas = [pf.Persona(mask=f"mask{index}") for index in range(len(masks))]
    attached = sharing(model)
    handle = stack.enter_context(pf.attach(attached, library))

    def one_by_one(tokens: int) -> torch.Tensor:
        return torch.cat([generator(twin, ids[row : row + 1])(tokens) for row, twin in enumerate(copies)])

    whole = model_bytes(model)
    bits = len(masks) * linear_bytes(model) // 16
    return [
        Runner(one_by_one, len(masks) * whole, tuple(masks)),
        Runner(
            generator(attached, ids, custom_generate=handle.generate, personas=personas),
            whole + bits,
            tuple(masks),
            goal=4.0,
        ),
    ]


DECODE_CASES: tuple[DecodeCase, ...] = tuple(
    case
    for shape in SHAPES
    for case in (
        DecodeCase(
            f"decode-{shape.name}-rows1",
            shape,
            (
                HF,
                "attached, no persona, our loop",
                "attached, no persona, stock generate",
                "one mask of 50 %, compressed",
            ),
            one_row,
            rows=1,
        ),
        DecodeCase(
            f"decode-{shape.name}-rows8-masks8",
            shape,
            ("8 masked copies, one after the other", "one batch, 8 masks"),
            eight_rows,
            rows=8,
            copies=8,
        ),
    )
)


class Judge:
    """Says whether greedily decoded tokens are right: near enough to the largest logit of the model in float32.

    A kernel may err twice as much as transformers in bf16 does, so the chosen token's logit may lie four times that
    below the largest.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._exact = copy.deepcopy(model).float()

    def check(self, name: str, runner: Runner, tokens: int = CHECKED_TOKENS) -> float:
        """The largest distance of a chosen token's logit from the largest, in units of what is allowed.

        Raises:
            CheckFailed: a token lies further below.
        """
        sequences = runner.generate(tokens)
        if sequences.shape != (len(runner.masks), PROMPT + tokens):
            raise CheckFailed(f"{name}: sequences of shape {list(sequences.shape)}")
        worst = 0.0
        for row, mask in enumerate(runner.masks):
            if row not in CHECKED_ROWS:
                continue
            ids = sequences[row : row + 1]
            plain = self._model if mask is None else masked_copy(self._model, mask)
            own, theirs = anatomy(self._exact).linears, anatomy(plain).linears
            for path, linear in own.items():
                linear.weight.data.copy_(theirs[path].weight.data)
            exact, usual = self._logits(self._exact, ids), self._logits(plain, ids)
            allowed = 4 * float((usual - exact).abs().max()) + 1e-6
            chosen = exact.gather(1, ids[0, PROMPT:, None])[:, 0]
            distance = float((exact.amax(1) - chosen).max()) / allowed
            if not distance <= 1:
                raise CheckFailed(
                    f"{name}: row {row} chose a token {distance:.1f} times further from the best than bf16 explains"
                )
            worst = max(worst, distance)
        return worst

    @staticmethod
    def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every new token, [tokens, V]."""
        logits: torch.Tensor = model(ids[:, :-1]).logits[0, PROMPT - 1 :]
        return logits.double()


def per_token(generate: Generate, tokens: int) -> float:
    seconds = []
    for length in (SHORT, SHORT + tokens):
        began = time.perf_counter()
        generate(length)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / tokens


def measure_decoding(case: DecodeCase, tokens: int, rounds: int) -> Measurement:
    """Check every runner, then time `rounds` samples of each, in turns.

    Raises:
        CheckFailed: a runner decodes something else; nothing has been timed.
        Absent: the memory for the case is not there.
    """
    if machine.available_memory() < case.needed_memory():
        needed, there = (f"{value / 2**30:.1f} GiB" for value in (case.needed_memory(), machine.available_memory()))
        raise Absent(f"needs {needed} of memory, {there} are free")
    ids = torch.randint(
        5, case.shape.config["vocab_size"], (case.rows, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    with contextlib.ExitStack() as stack, torch.no_grad():
        model = make_model(case.shape)
        built = dict(zip(case.contenders, case.build(model, ids, stack), strict=True))
        runners = {name: runner for name, runner in built.items() if isinstance(runner, Runner)}
        judge = Judge(model)
        for name, runner in runners.items():
            judge.check(f"{case.name}: {name}", runner)
        del judge
        gc.collect()
        samples: dict[str, Sample] = {READ: lambda: statistics.median(reader().sample() for _ in range(9))}
        for name, runner in runners.items():
            samples[name] = functools.partial(per_token, runner.generate, tokens)
        taken = interleave(samples, 0.0, min_rounds=rounds, max_rounds=rounds)
    read = [reader().nbytes / seconds / 1e9 for seconds in taken.pop(READ)]
    absent = {name: str(runner) for name, runner in built.items() if not isinstance(runner, Runner)}
    baseline = case.contenders[0]
    record = {
        "name": case.name,
        "model": {**case.shape.config, "parameters": parameters(case.shape), "dtype": "bfloat16"},
        "rows": case.rows,
        "tokens": tokens,
        "date": machine.today(),
        "commit": machine.commit(),
        "rounds": rounds,
        "read_bandwidth_gb_s": rounded(spread(read)),
        "baseline": baseline,
        "contenders": {
            name: {"absent": absent[name]}
            if name in absent
            else _figures(runners[name], taken[name], taken[baseline], read, case.rows, name == baseline)
            for name in case.contenders
        },
    }
    return Measurement(taken, record, absent)


def _figures(
    runner: Runner, taken: Sequence[float], theirs: Sequence[float], read: Sequence[float], rows: int, is_baseline: bool
) -> dict[str, Any]:
    median = spread(taken).median
    entry: dict[str, Any] = {
        "microseconds": rounded(spread([1e6 * seconds for seconds in taken])),
        "tokens_per_s": float(f"{rows / median:.4g}"),
        "bytes": runner.traffic,
        "gb_s": float(f"{runner.traffic / median / 1e9:.4g}"),
        "share_of_read_bandwidth": rounded(paired([runner.traffic / seconds / 1e9 for seconds in taken], read)),
    }
    if not is_baseline:
        entry["times_faster"] = rounded(paired(theirs, taken))
        if runner.goal is not None:
            entry["goal"] = runner.goal
    return entry
