"""Steering with plain hooks on one row without padding: what the fast paths are compared with."""

from __future__ import annotations

import contextlib

import torch

import personafast as pf
from personafast.vectors import blend


def window(step, index, prompt):
    """Which of the tokens with this index a step acts at, as METHODS has it."""
    if step.positions == "all":
        return True
    if step.positions == "prompt":
        return index < prompt
    if step.positions == "response":
        return index >= prompt - 1
    if step.positions == "last":
        return index == prompt - 1
    for start, stop in step.positions:
        from_end = start < 0
        low = start + prompt if from_end else start
        high = float("inf") if stop is None else stop + prompt if from_end or stop < 0 else stop
        if low <= index < high:
            return True
    return False


def value(schedule, index, prompt):
    """The schedule at a token."""
    number = max(0, index - prompt + 1)
    if isinstance(schedule, pf.FirstTokens):
        return 1.0 if number < schedule.tokens else 0.0
    if isinstance(schedule, pf.LinearSchedule):
        share = torch.tensor(number) / torch.tensor(float(schedule.steps))
        return float(schedule.start + (schedule.end - schedule.start) * share.clamp(max=1))
    return 1.0


def act(h, d, step, a):
    """One token's residual h [H] after one step along d [H]."""
    if step.operation == "add":
        return h + (d if a == 1 else d * a)
    if step.operation == "replace":
        return (1 - a) * h + a * d
    if step.operation == "norm_preserving":
        m = h + a * d
        return m * (h.square().sum() / m.square().sum()).sqrt()
    if not d.any():
        return h
    u = d.double() / d.double().norm()
    along = h.double() @ u
    if step.operation == "ablate":
        return (h - a * along * u).float()
    low, high = step.range
    return (h + a * (along.clamp(low, high) - along) * u).float()


@contextlib.contextmanager
def steering(net, blocks, library, persona, prompt, seen=0):
    """Hooks that steer passes over tokens seen, seen + 1, ... of one row with a prompt of `prompt` tokens."""
    handles, start = [], [seen]
    rows = [blend(library.vectors, s.vectors, blocks=s.blocks, normalize=s.normalize) for s in persona.steps]

    def after(block, last):
        def hook(_, __, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for place in range(hidden.shape[1]):
                index = start[0] + place
                for step, row in zip(persona.steps, rows, strict=True):
                    a = step.strength * value(step.schedule, index, prompt) * window(step, index, prompt)
                    if a and (row[block].any() or step.operation == "add"):
                        hidden[0, place] = act(hidden[0, place], row[block], step, a)
            if last:
                start[0] += hidden.shape[1]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_hook(after(index, index == len(blocks) - 1)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(net, blocks, library, persona, ids, prompt):
    """Logits [L, V] of one pass over a row's ids without a cache."""
    with steering(net, blocks, library, persona, prompt):
        return net(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(net, blocks, library, persona, ids, new):
    """Greedy tokens, each from a pass over the whole text."""
    ids, prompt = list(ids), len(ids)
    for _ in range(new):
        ids.append(int(logits(net, blocks, library, persona, ids, prompt)[-1].argmax()))
    return ids[prompt:]
