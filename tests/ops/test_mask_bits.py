import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError
from personafast.ops import _mask_bits


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 5), columns=st.integers(0, 131), seed=st.integers(0, 1000))
def test_round_trip_and_layout(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = ops.pack_mask(mask)
    assert packed.shape == (rows, -(-columns // 32)) and packed.dtype == torch.int32
    for o in range(rows):
        for w in range(packed.shape[1]):
            word = sum(int(mask[o, i]) << (i - 32 * w) for i in range(32 * w, min(32 * w + 32, columns)))
            assert int(packed[o, w]) % 2**32 == word
    assert torch.equal(ops.unpack_mask(packed, columns), mask)
    assert torch.equal(_mask_bits.unpack_reference(packed, columns), mask)


def test_bits_beyond_the_features_are_ignored():
    packed = torch.full((2, 1), -1, dtype=torch.int32)
    assert ops.unpack_mask(packed, 3).tolist() == [[True] * 3] * 2


def test_non_contiguous_words():
    mask = torch.rand(4, 70) < 0.5
    packed = ops.pack_mask(mask)
    assert torch.equal(ops.unpack_mask(packed.T.contiguous().T, 70), mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pack_mask(torch.ones(2, 3)), "`mask` has dtype float32, expected bool"),
        (lambda: ops.pack_mask(torch.ones(3, dtype=torch.bool)), r"`mask` has shape \[3\]"),
        (lambda: ops.unpack_mask(torch.zeros(2, 2, dtype=torch.int32), 65), "65 features need 3 words"),
        (lambda: ops.unpack_mask(torch.zeros(2, 2, dtype=torch.int32), -1), "-1 features"),
        (lambda: ops.unpack_mask(torch.zeros(2, 2), 64), "`packed` has dtype float32"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(PersonafastError, match=message):
        call()
