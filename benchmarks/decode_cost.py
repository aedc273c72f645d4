"""What personas cost in decoding, where reading the weights is the cost: one row, a Llama of 0.43 B random parameters.

Every case is run for few and for more new tokens; the difference of the medians, per token, is divided by that of stock
`generate` in the same run. The cases take turns. Correctness comes first: a row without a persona must give stock
generate's tokens.

    OMP_WAIT_POLICY=passive python benchmarks/decode_cost.py --output benchmarks/results/decode_cost.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import personafast as pf
from personafast.density.lora import LoraFactors, LoraPolicy
from personafast.models.anatomy import anatomy, linear_features

POLICIES, RANK = 4, 16
SHORT = 2


def make_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def make_library(model: Any) -> pf.PersonaLibrary:
    parts = anatomy(model)
    library = pf.PersonaLibrary(parts.shape)
    for index in range(POLICIES):
        factors = {}
        for path, linear in parts.linears.items():
            out, width = linear_features(linear)
            factors[path] = LoraFactors(0.01 * torch.randn(RANK, width), 0.01 * torch.randn(out, RANK), 1.0)
        library.add_policy(f"policy{index}", LoraPolicy(factors))
    for index in range(POLICIES):
        directions = 0.01 * torch.randn(parts.shape.num_blocks, parts.shape.hidden_size)
        library.add_vector(f"vector{index}", directions, blocks=range(parts.shape.num_blocks))
    return library


def cases() -> dict[str, tuple[pf.Persona | None, str]]:
    policies = {f"policy{index}": 1.0 for index in range(POLICIES)}
    vectors = {f"vector{index}": 1.0 for index in range(POLICIES)}
    return {
        "no persona": (None, "direct"),
        "4 vectors at every block": (pf.Persona(vectors=vectors), "direct"),
        "1 LoRA policy": (pf.Persona(policies={"policy0": 1.0}), "direct"),
        "merge of 4 policies": (pf.Persona(policies=policies), "merge"),
        "direct, 4 policies and the reference": (pf.Persona(policies=policies), "direct"),
        "direct, linear rule, 4 policies": (pf.Persona(policies=policies, aggregator="linear"), "direct"),
    }


def measure(tokens: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    model = make_model(dtype)
    library = make_library(model)
    ids = torch.randint(5, 32000, (1, 16))
    names = ["stock generate", *cases()]
    # Seconds of every run, by the number of new tokens: the prompt and the set-up are in both and cancel.
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in names for n in (SHORT, SHORT + tokens)}
    for turn in range(rounds + 1):
        stock = generate(model, ids, SHORT, None)
        for length in (SHORT, SHORT + tokens):
            with pf.attach(model, library) as handle:
                if turn == 0:
                    same = generate(model, ids, SHORT, handle)
                    assert torch.equal(same, stock), "a row without a persona differs from stock generate"
                for name, (persona, sampler) in cases().items():
                    options = {"personas": persona, "sampler": sampler}
                    seconds[name, length].append(timed(lambda: generate(model, ids, length, handle, **options)))  # noqa: B023
            seconds["stock generate", length].append(timed(lambda: generate(model, ids, length, None)))  # noqa: B023
    # The first turn warms up caches and threads.
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    per_token = {name: (medians[name, SHORT + tokens] - medians[name, SHORT]) / tokens for name in names}
    return {
        "model": {"parameters": sum(p.numel() for p in model.parameters()), "dtype": str(dtype), "rows": 1},
        "settings": {"tokens": tokens, "rounds": rounds, "policies": POLICIES, "rank": RANK},
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "personafast")},
        },
        "cases": {
            name: {
                "ms_per_token": round(1000 * value, 1),
                "times_stock": round(value / per_token["stock generate"], 3),
            }
            for name, value in per_token.items()
        },
    }


def generate(model: Any, ids: torch.Tensor, tokens: int, handle: pf.PersonaHandle | None, **options: Any) -> Any:
    if handle is not None:
        options["custom_generate"] = handle.generate
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16, help="new tokens that are timed")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every case")
    parser.add_argument("--output", type=Path, help="where to write the JSON; printed when left out")
    options = parser.parse_args()
    text = json.dumps(measure(options.tokens, options.rounds, torch.bfloat16), indent=2)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
