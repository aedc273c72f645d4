import pytest
import torch

from personafast import ops
from personafast.ops import _mask_bits


@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 97, 512, 4200])
def test_equals_the_reference_and_comes_back(columns):
    wide = torch.rand(3, columns + 5, generator=torch.Generator().manual_seed(columns)) < 0.5
    mask = wide[:, :columns]
    packed = ops.pack_mask(mask)
    assert packed.dtype == torch.int32 and torch.equal(packed, _mask_bits.pack_reference(mask))
    between = torch.nn.functional.pad(packed, (0, 2))[:, : packed.shape[1]]
    for words in (packed, between, packed.T.contiguous().T):
        unpacked = ops.unpack_mask(words, columns)
        assert unpacked.dtype == torch.bool and unpacked.is_contiguous() and torch.equal(unpacked, mask)
    assert torch.equal(ops.pack_mask(mask.T.contiguous().T), packed)


def test_any_byte_but_zero_is_true_and_true_is_one():
    mask = torch.arange(256, dtype=torch.uint8).repeat(2, 1).view(torch.bool)
    packed = ops.pack_mask(mask)
    assert packed.tolist() == [[-2] + [-1] * 7] * 2
    assert ops.unpack_mask(packed, 256).view(torch.uint8).tolist() == [[0] + [1] * 255] * 2


def test_bits_beyond_the_features_are_ignored_and_no_rows():
    packed = torch.full((2, 3), -1, dtype=torch.int32)
    assert ops.unpack_mask(packed, 67).view(torch.uint8).tolist() == [[1] * 67] * 2
    assert ops.unpack_mask(packed[:0], 67).shape == (0, 67)
    assert ops.pack_mask(torch.empty(0, 67, dtype=torch.bool)).shape == (0, 3)
