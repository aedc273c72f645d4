"""Decoding end to end on a GPU: random models of the shapes people use, captured passes beside transformers' own."""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import personafast as pf
from benchmarks import machine
from benchmarks.gpu.device import Device
from personafast.density import model_scorer
from personafast.density.lora import LoraFactors, LoraPolicy
from personafast.models.anatomy import anatomy, linear_features
from personafast.policies import PolicySet

SHAPES = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPT, TOKENS, SKIPPED, REPEATS = 32, 96, 8, 5
RANK = 16
# Leaves a policy's next-token distribution near the reference's, as training does.
UPDATE = 0.004

CAPTURED, EAGER = "captured, reference alone", "transformers, eager"
STATIC = "transformers, static cache, torch.compile"
STEERED = "captured, every row steered its own way"
# Decodes with a streamer that takes the time of every token.
Decode = Callable[["Stamps"], None]


class Stamps:
    """A streamer that notes when tokens came, a batch of rows counting once.

    Args:
        rows: rows of the batch.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._times: list[float] = []
        self._tokens: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then new tokens."""
        if self._prompt:
            self._prompt = False
            return
        self._times.append(time.perf_counter())
        self._tokens.append(int(value.numel()))

    def end(self) -> None:
        """Nothing more comes."""

    def seconds(self) -> float:
        """Seconds a token of a row, between the first few and the last."""
        skipped = min(SKIPPED, len(self._times) - 2)
        spent = self._times[-1] - self._times[skipped]
        return spent * self._rows / sum(self._tokens[skipped + 1 :])


@dataclass(frozen=True)
class Scene:
    """Contenders that decode the same prompt.

    Attributes:
        name: what `--only` selects by.
        shape: of `SHAPES`.
        rows: rows of the batch.
        build: makes the contenders by name; what has to be undone goes on the stack.
        goals: (contender, baseline, how many times as fast it has to be); None where it is only reported.
    """

    name: str
    shape: str
    rows: int
    build: Callable[[Any, torch.Tensor, contextlib.ExitStack], Mapping[str, Decode]]
    goals: tuple[tuple[str, str, float | None], ...]


def _model(shape: Mapping[str, int], device: Device) -> Any:
    import transformers

    config = transformers.LlamaConfig(**shape, eos_token_id=None, pad_token_id=0, max_position_embeddings=4096)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.float32 if device.rehearsal else torch.bfloat16)
        with torch.device(device.name):
            net = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    net.generation_config.eos_token_id = None
    return net


def _policy(net: Any, seed: int) -> LoraPolicy:
    """A random update of every linear of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, linear in anatomy(net).linears.items():
        outputs, features = linear_features(linear)
        a = torch.randn(RANK, features, generator=generator) * features**-0.5
        b = torch.randn(outputs, RANK, generator=generator) * UPDATE
        factors[path] = LoraFactors(a, b, 1.0)
    return LoraPolicy(factors)


def _apart(net: Any, seed: int) -> Any:
    """A separate model: a copy with such an update in its weights."""
    found = copy.deepcopy(net)
    for path, factor in _policy(net, seed).factors.items():
        weight = found.get_submodule(path).weight
        with torch.no_grad():
            weight += (factor.scale * factor.b @ factor.a).to(weight)
    return found


def _stock(net: Any, ids: torch.Tensor, **options: Any) -> Decode:
    def decode(streamer: Stamps) -> None:
        net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            streamer=streamer,
            **options,
        )

    return decode


def _ours(handle: pf.PersonaHandle, ids: torch.Tensor, personas: Any, **options: Any) -> Decode:
    def decode(streamer: Stamps) -> None:
        sampling = {"do_sample": True, "top_k": 0} if options else {"do_sample": False}
        handle.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            custom_generate=handle.bind(streamer=streamer),
            personas=personas,
            **sampling,
            **options,
        )

    return decode


def _plain(net: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> Mapping[str, Decode]:
    def captured(streamer: Stamps) -> None:
        # Attached for this text alone: stock generate is to run on the model as it is. The recording is made at the
        # first tokens, which are not timed.
        with pf.attach(net, graphs=True) as handle:
            _ours(handle, ids, None)(streamer)

    return {
        EAGER: _stock(net, ids),
        STATIC: _stock(net, ids, cache_implementation="static"),
        CAPTURED: captured,
    }


def _steered(net: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> Mapping[str, Decode]:
    rows, config = ids.shape[0], net.config
    library = pf.PersonaLibrary(anatomy(net).shape)
    generator = torch.Generator().manual_seed(1)
    for row in range(rows):
        vector = torch.randn(config.num_hidden_layers, config.hidden_size, generator=generator) * 0.01
        library.add_vector(f"v{row}", vector)
    handle = stack.enter_context(pf.attach(net, library, max_personas=rows, graphs=True))
    personas = [pf.Persona(vectors={f"v{row}": 1.0}) for row in range(rows)]
    return {CAPTURED: _ours(handle, ids, None), STEERED: _ours(handle, ids, personas)}


def _direct(net: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> Mapping[str, Decode]:
    library = pf.PersonaLibrary(anatomy(net).shape)
    for index in range(4):
        library.add_policy(f"p{index}", _policy(net, index))
    handle = stack.enter_context(pf.attach(net, library, graphs=True))
    persona = pf.Persona(policies={f"p{index}": 0.25 for index in range(4)})
    alone = _ours(handle, ids, None, sampler="direct")
    return {CAPTURED: alone, "direct, 4 LoRA policies": _ours(handle, ids, persona, sampler="direct")}


def _separate(net: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> Mapping[str, Decode]:
    policies = PolicySet.from_models(net, {f"m{index}": _apart(net, index) for index in range(4)})
    handle = stack.enter_context(pf.attach(net, policies=policies, graphs=True))
    persona = pf.Persona(policies={f"m{index}": 1.0 for index in range(4)})

    def in_turn(streamer: Stamps) -> None:
        model_scorer.FORK = False
        try:
            _ours(handle, ids, persona, sampler="direct")(streamer)
        finally:
            model_scorer.FORK = True

    return {
        "direct": _ours(handle, ids, persona, sampler="direct"),
        "direct, models in turn": in_turn,
        "verify, merge drafts, k = 8": _ours(handle, ids, persona, sampler="verify", draft="merge", chunk=8),
    }


def _rejection(net: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> Mapping[str, Decode]:
    policies = PolicySet.from_models(net, {f"m{index}": _apart(net, index) for index in range(2)})
    handle = stack.enter_context(pf.attach(net, policies=policies, graphs=True))
    persona = pf.Persona(policies={"m0": 0.5, "m1": 0.5}, aggregator="linear")
    return {
        "token-level rejection": _ours(handle, ids, persona, sampler="token_rs"),
        "scr, k = 4": _ours(handle, ids, persona, sampler="scr", chunk=4),
    }


SCENES = (
    Scene("decode-8b-rows1", "8b", 1, _plain, ((CAPTURED, STATIC, 1.0), (CAPTURED, EAGER, 2.0))),
    Scene("steered-8b-rows256", "8b", 256, _steered, ((STEERED, CAPTURED, 1 / 1.01),)),
    Scene("direct-8b-lora4", "8b", 1, _direct, (("direct, 4 LoRA policies", CAPTURED, 0.85),)),
    Scene(
        "verify-1b-models4",
        "1b",
        1,
        _separate,
        (("verify, merge drafts, k = 8", "direct", 2.0), ("direct", "direct, models in turn", None)),
    ),
    Scene("scr-1b-models2", "1b", 1, _rejection, (("scr, k = 4", "token-level rejection", 3.0),)),
)


def run(scene: Scene, device: Device) -> dict[str, Any]:
    """The record of a scene: tokens a second of a row for every contender, and how they compare."""
    shape = TINY if device.rehearsal else SHAPES[scene.shape]
    rows = min(scene.rows, 3) if device.rehearsal else scene.rows
    repeats = 1 if device.rehearsal else REPEATS
    net = _model(shape, device)
    ids = torch.randint(3, shape["vocab_size"], (rows, PROMPT), generator=torch.Generator().manual_seed(2))
    ids = ids.to(device.name)
    seconds: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, decode in scene.build(net, ids, stack).items():
            try:
                taken = []
                for _ in range(repeats + 1):
                    stamps = Stamps(rows)
                    decode(stamps)
                    device.synchronize()
                    taken.append(stamps.seconds())
                seconds[name] = taken[1:]
            except Exception as error:
                absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    del net
    gc.collect()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    comparisons = []
    for name, baseline, goal in scene.goals:
        if name in medians and baseline in medians:
            ratio = medians[baseline] / medians[name]
            found = {"contender": name, "baseline": baseline, "times_faster": float(f"{ratio:.4g}")}
            comparisons.append(found if goal is None else {**found, "goal": round(goal, 4)})
    return {
        "date": machine.today(),
        "shape": dict(shape),
        "rows": rows,
        "contenders": {
            **{
                name: {
                    "ms_a_token": float(f"{1e3 * medians[name]:.4g}"),
                    "lowest": float(f"{1e3 * min(taken):.4g}"),
                    "highest": float(f"{1e3 * max(taken):.4g}"),
                    "tokens_per_s": float(f"{rows / medians[name]:.4g}"),
                }
                for name, taken in seconds.items()
            },
            **{name: {"absent": why} for name, why in absent.items()},
        },
        "comparisons": comparisons,
    }


def same_texts(device: Device) -> dict[str, Any]:
    """Texts of replayed passes against those of passes by call, on a small model in fp32, sampler by sampler.

    Raises:
        AssertionError: one differs.
    """
    net = _model({**TINY, "hidden_size": 64, "intermediate_size": 128}, device).float()
    library = pf.PersonaLibrary(anatomy(net).shape)
    for index in range(2):
        library.add_policy(f"p{index}", _policy(net, index))
    library.add_vector("v", torch.randn(2, 64, generator=torch.Generator().manual_seed(3)))
    personas = [
        pf.Persona(vectors={"v": 1.0}),
        None,
        pf.Persona(policies={"p0": 1.0, "p1": 0.7}),
    ]
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(2)).to(device.name)
    checked = []
    for sampler, more in (("direct", {}), ("verify", {"draft": "merge", "chunk": 4}), ("block", {"chunk": 3})):
        texts = []
        for graphs in (False, True):
            with pf.attach(net, library, graphs=graphs) as handle, torch.no_grad():
                texts.append(
                    net.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=24,
                        do_sample=True,
                        top_k=0,
                        custom_generate=handle.generate,
                        personas=personas,
                        sampler=sampler,
                        seed=11,
                        **more,
                    )
                )
        if not torch.equal(*texts):
            raise AssertionError(f"{sampler}: replayed passes write another text than passes by call")
        checked.append(sampler)
    return {"relative_error": 0.0, "samplers": checked}
