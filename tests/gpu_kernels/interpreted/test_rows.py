import pytest
import torch
from personafast._triton.rows import in_one_wave, whole_row


@pytest.mark.parametrize(
    "width", [896, 1536, 2048, 2304, 2560, 2880, 3584, 4096, 5120, 7168, 8192, 11008, 16384, 20480]
)
def test_rows_of_real_models_stay_in_registers_and_leave_few_threads_idle(width):
    constants, warps = whole_row(width)
    block, tiles = constants["BLOCK"], constants["TILES"]
    assert constants["HELD"] and width <= block * tiles <= width * 1.2
    assert block == 32 * warps * 8 and warps <= 16


def test_narrow_and_wide_rows():
    assert whole_row(0) == whole_row(1) == ({"BLOCK": 256, "TILES": 1, "HELD": True}, 1)
    assert whole_row(20481) == ({"BLOCK": 4096, "TILES": 6, "HELD": False}, 16)


def test_a_wave_is_what_fits_on_the_device():
    # 132 multiprocessors of 6 programs of 256 threads.
    assert in_one_wave(torch.empty(0), 792, 8) and not in_one_wave(torch.empty(0), 793, 8)
