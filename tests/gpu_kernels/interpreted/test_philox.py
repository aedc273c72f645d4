import pytest
import torch

from personafast.errors import PersonafastError
from personafast.ops import philox


@pytest.mark.parametrize("stream", [0, 2, 2**31 + 5, 2**32 - 1])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 150])
def test_every_bit_is_that_of_the_reference(stream, n):
    g = torch.Generator().manual_seed(n)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (2, 5), generator=g)
    seeds[0], seeds[1], positions[0], positions[1] = 0, -1, 2**32, -(2**63)
    found = philox.uniform(seeds, positions, stream, n)
    assert found.dtype == torch.float64 and torch.equal(found, philox.reference(seeds, positions, stream, n))


def test_rows_that_are_not_adjacent_and_none():
    seeds, positions = torch.arange(8).view(4, 2).T[0], torch.arange(1).expand(4)
    assert torch.equal(philox.uniform(seeds, positions, 1, 2), philox.reference(seeds, positions, 1, 2))
    assert philox.uniform(seeds[:0], positions[:0], 1, 2).shape == (0, 2)


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(PersonafastError, match="`positions` is on meta, expected cpu"):
        philox.uniform(torch.arange(2), torch.arange(2, device="meta"), 0)
