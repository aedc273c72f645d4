"""Every operation, at every kind of positions, is what hooks by hand make of one row without padding."""

import itertools

import pytest
import torch
from helpers import by_hand, tiny

import personafast as pf
from personafast.models.anatomy import anatomy

pytestmark = pytest.mark.usefixtures("reference_backend")
NEW = 6
VECTORS = {"creative": 1.5, "futurist": -0.5}
OPERATIONS = {
    "add": {},
    "ablate": {"strength": 0.8},
    "clamp": {"low": 0.5, "high": 1.0},
    "target": {"operation": "clamp", "target": 2.0},
    "norm_preserving": {"strength": 2.0},
    "replace": {"strength": 0.6},
}
POSITIONS = {
    "all": "all",
    "prompt": "prompt",
    "response": "response",
    "last": "last",
    "spans": [(1, 3), (-2, 3)],
    "tail": [(2, -1), (-1, None)],
}
SCHEDULES = {
    "constant": "constant",
    "first": pf.FirstTokens(3),
    "linear": pf.LinearSchedule(4, 1.5, 0.25),
}


def persona(operation="add", positions="all", schedule="constant", **more):
    options = {"operation": operation, **OPERATIONS[operation], **more}
    return pf.Persona(
        steering=[pf.Steering(VECTORS, positions=POSITIONS[positions], schedule=SCHEDULES[schedule], **options)]
    )


ALL = {
    f"{operation}-{positions}-{schedule}": persona(operation, positions, schedule)
    for operation, positions, schedule in [
        *itertools.product(OPERATIONS, POSITIONS, ["constant"]),
        *itertools.product(["add", "ablate", "replace"], ["all", "response", "spans"], ["first", "linear"]),
    ]
}


@pytest.fixture(scope="module")
def parts():
    return anatomy(tiny.model()).blocks


def padded(side):
    """Rows of 7, 4 and 6 tokens, and each row's ids."""
    rows = torch.randint(3, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [ids[:length] for ids, length in zip(rows, (7, 4, 6), strict=True)]
    filled = [[0] * (7 - len(ids)) + ids if side == "left" else ids + [0] * (7 - len(ids)) for ids in rows]
    live = [[0] * (7 - len(ids)) + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * 3 for ids in rows]
    live = [mask[:7] for mask in live]
    return {"input_ids": torch.tensor(filled), "attention_mask": torch.tensor(live)}, rows


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_a_padded_pass_over_prompt_and_response_is_the_row_by_hand(net, library, name, side):
    batch, rows = padded(side)
    prompts = [4, 2, 6]
    with pf.attach(net, library) as handle, handle.using([ALL[name], None, ALL[name]], prompts):
        found = net(**batch, use_cache=False).logits
    plain = pf.Persona()
    for row, who in enumerate([ALL[name], plain, ALL[name]]):
        expected = by_hand.logits(net, anatomy(net).blocks, library, who, rows[row], prompts[row])
        live = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][live], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ALL)
def test_decoding_over_a_cache_is_the_row_by_hand(net, library, name):
    batch, rows = padded("left")
    who = [None, ALL[name], ALL[name]]
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = [
        by_hand.greedy(net, anatomy(net).blocks, library, p or pf.Persona(), ids, NEW)
        for p, ids in zip(who, rows, strict=True)
    ]
    with pf.attach(net, library) as handle:
        with handle.using(who):
            stock = net.generate(**batch, **options)[:, -NEW:].tolist()
        ours = net.generate(**batch, **options, custom_generate=handle.generate, personas=who)[:, -NEW:].tolist()
    assert stock == expected
    assert ours == expected
