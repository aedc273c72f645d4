"""The benchmark of masks on a tiny model: it counts bytes once each, and times what it says."""

import pytest
import torch

from benchmarks import masks
from benchmarks.decode import Shape, drawn
from personafast.models.anatomy import anatomy

TINY = Shape(
    "tiny",
    {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
)


@torch.no_grad()
def test_eight_masks_cost_one_bit_a_weight_each():
    net = drawn(TINY)
    plain = [linear.weight.numel() for linear in anatomy(net).linears.values()]
    found, handle = masks.memory(net)
    assert found["model_bytes"] == sum(2 * parameter.numel() for parameter in net.parameters())
    # The bits stand once in memory, though library and model both have them: 2 + P/8 bytes a weight.
    assert found["with_masks_bytes"] == found["model_bytes"] + sum(plain)
    assert found["bytes_a_masked_weight"] == pytest.approx(2 + 8 / 8)
    for name, measured, baseline in (
        ("switching", masks.switching(handle, 0.0), "multiplied into the weights"),
        ("decoding", masks.decoding(handle, 0.0), "eight hard masks"),
    ):
        ways = {key: value for key, value in measured.items() if key not in ("baseline", "rounds")}
        assert measured["baseline"] == baseline, name
        assert all(("times_faster" in way) == (key != baseline) for key, way in ways.items()), name
        assert len(ways) == 5


def test_storages_count_once():
    tensor = torch.zeros(100)
    assert masks.held([tensor, tensor[10:], tensor.view(10, 10), torch.zeros(3)]) == 412
