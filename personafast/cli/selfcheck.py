"""What `personafast doctor` runs: every operator against its reference, and the built-in model end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from personafast import ops

Case = Callable[[torch.Generator, str], torch.Tensor]


class Check(NamedTuple):
    """One outcome; `detail` is the largest error, or what went wrong."""

    name: str
    passed: bool
    detail: str


def _normal(generator: torch.Generator, device: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device)


def _slots(device: str) -> torch.Tensor:
    return torch.tensor([0, -1, 2, 1, 2], dtype=torch.int32, device=device)


def _bits(generator: torch.Generator, device: str, *shape: int) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) < 0.5).to(device)


def _rules(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of every aggregator, and their exponents."""
    rules = torch.tensor(list(ops.Aggregator), dtype=torch.int32, device=device)
    return rules, torch.full(rules.shape, -1.0, device=device)


def _inject(generator: torch.Generator, device: str) -> torch.Tensor:
    hidden = _normal(generator, device, 5, 37)
    ops.inject_(hidden, _normal(generator, device, 3, 37), _slots(device), _normal(generator, device, 5))
    return hidden


def _masked_linear(generator: torch.Generator, device: str) -> torch.Tensor:
    masks = torch.stack([ops.pack_mask(_bits(generator, device, 11, 70)) for _ in range(3)])
    x, weight = _normal(generator, device, 5, 70), _normal(generator, device, 11, 70)
    return ops.masked_linear(x, weight, masks, _slots(device), torch.tensor([0.0, 0.5, 0.0], device=device))


def _pack_mask(generator: torch.Generator, device: str) -> torch.Tensor:
    return ops.pack_mask(_bits(generator, device, 3, 70))


def _unpack_mask(generator: torch.Generator, device: str) -> torch.Tensor:
    return ops.unpack_mask(ops.pack_mask(_bits(generator, device, 3, 70)), 70)


def _lora_delta(generator: torch.Generator, device: str) -> torch.Tensor:
    out, x = _normal(generator, device, 5, 11), _normal(generator, device, 5, 37)
    down, up = _normal(generator, device, 3, 4, 37), _normal(generator, device, 3, 11, 4)
    ranks = torch.tensor([4, 2, 3], dtype=torch.int32, device=device)
    ops.lora_delta_(out, x, down, up, _slots(device), _normal(generator, device, 3), ranks)
    return out


def _token_logprobs(generator: torch.Generator, device: str) -> torch.Tensor:
    tokens = torch.tensor([0, 40, 7, 7, 12], device=device)
    return ops.token_logprobs(_normal(generator, device, 5, 37), _normal(generator, device, 41, 37), tokens)


def _chunk_scores(generator: torch.Generator, device: str) -> torch.Tensor:
    rows = len(ops.Aggregator)
    reference, policies = -_normal(generator, device, rows, 4).abs(), -_normal(generator, device, 3, rows, 4).abs()
    return ops.chunk_scores(reference, policies, torch.ones(rows, 3, device=device), None, *_rules(device))


def _chunk_accept(generator: torch.Generator, device: str) -> torch.Tensor:
    scores, bound, draws = (_normal(generator, device, 2, 4) for _ in range(3))
    return ops.chunk_accept(scores, bound, -draws.abs(), torch.tensor([4, 2], dtype=torch.int32, device=device))


def _chunk_scores_accept(generator: torch.Generator, device: str) -> torch.Tensor:
    rows = len(ops.Aggregator)
    reference, policies = -_normal(generator, device, rows, 4).abs(), -_normal(generator, device, 3, rows, 4).abs()
    bound, draws = _normal(generator, device, rows, 4), -_normal(generator, device, rows, 4).abs()
    lengths = torch.arange(rows, dtype=torch.int32, device=device).clamp(max=4)
    scores, accepted = ops.chunk_scores_accept(
        reference, policies, torch.ones(rows, 3, device=device), None, *_rules(device), bound, draws, lengths
    )
    return torch.cat([scores, accepted[:, None].float()], 1)


def _aggregate_logits(generator: torch.Generator, device: str) -> torch.Tensor:
    rows = len(ops.Aggregator)
    reference, policies = _normal(generator, device, rows, 41), _normal(generator, device, 3, rows, 41)
    min_p = torch.linspace(0.0, 0.1, rows, device=device)
    return ops.aggregate_logits(reference, policies, torch.ones(rows, 3, device=device), None, *_rules(device), min_p)


def _steer(generator: torch.Generator, device: str) -> torch.Tensor:
    hidden, modes = _normal(generator, device, 5, 37), torch.tensor([0, 1, 2], dtype=torch.int8, device=device)
    params = _normal(generator, device, 3, 2).sort(1).values
    return ops.steer_(hidden, _normal(generator, device, 3, 37), _slots(device), modes, params)


def _add_inject_rms_norm(generator: torch.Generator, device: str) -> torch.Tensor:
    update, residual = _normal(generator, device, 5, 37), _normal(generator, device, 5, 37)
    bank, weight = _normal(generator, device, 3, 37), _normal(generator, device, 37)
    return torch.cat(ops.add_inject_rms_norm(update, residual, bank, _slots(device), None, weight, 1e-6))


def _compress(generator: torch.Generator, device: str) -> torch.Tensor:
    return ops.compress(_normal(generator, device, 11, 70), ops.pack_mask(_bits(generator, device, 11, 70)))[0]


def _sparse_linear(generator: torch.Generator, device: str) -> torch.Tensor:
    compressed = ops.compress(_normal(generator, device, 11, 70), ops.pack_mask(_bits(generator, device, 11, 70)))
    return ops.sparse_linear(_normal(generator, device, 5, 70), *compressed)


def _verify_draft(generator: torch.Generator, device: str) -> torch.Tensor:
    target, draft = (_normal(generator, device, 2, n, 41).log_softmax(-1) for n in (4, 3))
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]], device=device)
    lengths = torch.tensor([3, 2], dtype=torch.int32, device=device)
    seeds, positions = torch.tensor([5, 6], device=device), torch.tensor([0, 7], device=device)
    drawn, accepted = ops.verify_draft(target, draft, tokens, lengths, seeds, positions, True)
    return torch.cat([drawn, accepted[:, None]], 1)


CASES: dict[str, Case] = {
    "inject_": _inject,
    "masked_linear": _masked_linear,
    "pack_mask": _pack_mask,
    "unpack_mask": _unpack_mask,
    "lora_delta_": _lora_delta,
    "token_logprobs": _token_logprobs,
    "chunk_scores": _chunk_scores,
    "chunk_accept": _chunk_accept,
    "chunk_scores_accept": _chunk_scores_accept,
    "aggregate_logits": _aggregate_logits,
    "steer_": _steer,
    "add_inject_rms_norm": _add_inject_rms_norm,
    "compress": _compress,
    "sparse_linear": _sparse_linear,
    "verify_draft": _verify_draft,
}


def check_operator(op: str, device: str, tolerance: float = 1e-4) -> Check:
    """Run `op` on one small random input by the chosen backend and by the reference, and compare."""
    name = f"{op} on {device}"
    try:
        found = CASES[op](torch.Generator().manual_seed(0), device)
        with ops.use_backend("reference"):
            expected = CASES[op](torch.Generator().manual_seed(0), device)
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")
    found, expected = found.double(), expected.double()
    # A support mask writes -inf: those places must agree exactly, and their difference is no number.
    same = found.isfinite() == expected.isfinite()
    if found.shape != expected.shape or not bool(same.all()):
        return Check(name, False, "another shape or other infinities than the reference")
    finite = expected.isfinite()
    largest = float((found - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
    return Check(name, largest <= tolerance, f"largest error {largest:.1e}")


def check_zoo() -> Check:
    """Blend two policies in one row, leave the next row plain, detach: plain rows must equal the unpatched model's."""
    name = "built-in model, two policies and a plain row"
    try:
        from personafast import zoo
        from personafast.evaluate.chat import encode
        from personafast.handle import attach
        from personafast.persona import Persona

        model: Any
        model, tokenizer, library = zoo.load()
        inputs = encode(tokenizer, zoo.prompts(1, 0) * 2)
        settings = {"do_sample": False, "max_new_tokens": 32}

        def texts(**more: Any) -> list[str]:
            sequences = model.generate(**inputs, **settings, **more)
            return [str(text) for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]

        before = texts()
        blend = Persona(policies=dict.fromkeys(zoo.DEMO_TRAITS[:2], 1.0))
        with attach(model, library, tokenizer=tokenizer) as personas:
            during = texts(custom_generate=personas.generate, personas=[blend, None])
        after = texts()
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")
    if before != after:
        return Check(name, False, "the model differs after detach")
    if during[1] != before[1]:
        return Check(name, False, "a row without persona differs from the unpatched model")
    if during[0] == before[0]:
        return Check(name, False, "the personas changed nothing")
    return Check(name, True, "blended, restored, and the plain row untouched")


def checks(devices: list[str]) -> Iterator[Check]:
    """Every check, one after another."""
    for device in devices:
        for op in CASES:
            yield check_operator(op, device)
    yield check_zoo()
