"""The checks that operators share: devices, and rows that are written."""

import pytest
import torch

from personafast import ops
from personafast.errors import PersonafastError

SLOTS = torch.zeros(3, dtype=torch.int32)
BANK = torch.ones(1, 8)


def inject(hidden, bank=BANK):
    ops.inject_(hidden, bank, SLOTS)


def steer(hidden, directions=BANK):
    ops.steer_(hidden, directions, SLOTS, torch.zeros(1, dtype=torch.int8), torch.ones(1, 2))


def lora(out, A=None):  # noqa: N803
    A = torch.ones(1, 2, 5) if A is None else A  # noqa: N806
    ops.lora_delta_(out, torch.ones(3, 5), A, torch.ones(1, 8, 2), SLOTS, torch.ones(1), SLOTS[:1] + 2)


@pytest.mark.parametrize("call", [inject, steer, lora])
def test_rows_that_share_memory_are_not_written(call):
    memory = torch.ones(40)
    for strides in ((0, 1), (5, 1)):
        with pytest.raises(PersonafastError, match=rf"rows that overlap in memory \(strides \[{strides[0]}, 1\]\)"):
            call(memory.as_strided((3, 8), strides))
    assert torch.equal(memory, torch.ones(40))
    call(memory.as_strided((3, 8), (9, 1)))
    call(torch.ones(8, 3).T)


@pytest.mark.parametrize(("call", "name"), [(inject, "bank"), (steer, "directions"), (lora, "A")])
def test_an_argument_of_another_device_is_not_ignored(call, name):
    other = torch.ones(1, 2, 5, device="meta") if name == "A" else BANK.to("meta")
    hidden = torch.ones(3, 8)
    with pytest.raises(PersonafastError, match=f"`{name}` is on meta, expected cpu"):
        call(hidden, other)
    assert torch.equal(hidden, torch.ones(3, 8))


def test_the_other_operators_look_at_devices_too():
    x, weight, tokens = torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(PersonafastError, match="token_logprobs: `lm_head` is on meta, expected cpu"):
        ops.token_logprobs(x, weight.to("meta"), tokens)
    with pytest.raises(PersonafastError, match="add_inject_rms_norm: `weight` is on meta, expected cpu"):
        ops.add_inject_rms_norm(x, x, BANK, SLOTS, None, BANK[0].to("meta"), 1e-5)
    with pytest.raises(PersonafastError, match="token_logprobs: `softcap` is nan"):
        ops.token_logprobs(x, weight, tokens, softcap=float("nan"))
