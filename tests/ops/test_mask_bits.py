import pytest
import torch
from helpers.backends import BACKENDS, on
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError
from personafast.ops import _mask_bits


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(0, 5), columns=st.integers(0, 200), pad=st.integers(0, 3), seed=st.integers(0, 1000))
def test_round_trip_and_layout(backend, rows, columns, pad, seed):
    wide = torch.rand(rows, columns + pad, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = wide[:, :columns]
    with on(backend):
        packed = ops.pack_mask(mask)
        assert packed.shape == (rows, -(-columns // 32)) and packed.dtype == torch.int32
        for o in range(rows):
            for w in range(packed.shape[1]):
                word = sum(int(mask[o, i]) << (i - 32 * w) for i in range(32 * w, min(32 * w + 32, columns)))
                assert int(packed[o, w]) % 2**32 == word
        unpacked = ops.unpack_mask(packed, columns)
        assert unpacked.dtype == torch.bool and torch.equal(unpacked, mask)
        between = torch.nn.functional.pad(packed, (0, pad))[:, : packed.shape[1]]
        assert torch.equal(ops.unpack_mask(between, columns), mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_beyond_the_features_are_ignored(backend):
    packed = torch.full((2, 3), -1, dtype=torch.int32)
    with on(backend):
        assert ops.unpack_mask(packed[:, :1], 3).tolist() == [[True] * 3] * 2
        unpacked = ops.unpack_mask(packed, 67)
    assert unpacked.all() and (unpacked.view(torch.uint8) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_byte_but_zero_is_true(backend):
    mask = torch.arange(256, dtype=torch.uint8).repeat(2, 1).view(torch.bool)
    with on(backend):
        packed = ops.pack_mask(mask)
    assert packed.tolist() == [[-2] + [-1] * 7] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_masks_and_words(backend):
    mask = torch.rand(4, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    with on(backend):
        packed = ops.pack_mask(mask)
        assert torch.equal(ops.pack_mask(mask.T.contiguous().T), packed)
        assert torch.equal(ops.unpack_mask(packed.T.contiguous().T, 70), mask)
        assert torch.equal(ops.unpack_mask(packed, 70), mask)


def test_kernel_rows_do_not_depend_on_threads():
    mask = torch.rand(1500, 2000, generator=torch.Generator().manual_seed(0)) < 0.5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with on("cpu"):
            packed = ops.pack_mask(mask)
            assert torch.equal(ops.unpack_mask(packed, 2000), mask)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(packed, _mask_bits.pack_reference(mask))


@pytest.mark.parametrize("columns", [1, 31, 33, 64, 97])
def test_kernel_writes_every_output_and_nothing_else(columns):
    core = pytest.importorskip("personafast._C")
    mask, width = torch.ones(3, columns, dtype=torch.bool), -(-columns // 32)
    packed = torch.full((5, width), 7, dtype=torch.int32)
    core.pack_mask(mask.data_ptr(), columns, packed[1:].data_ptr(), 3, columns, 2)
    assert torch.equal(packed[1:4], _mask_bits.pack_reference(mask)) and (packed[[0, 4]] == 7).all()
    bytes_ = torch.full((5, columns), 7, dtype=torch.uint8)
    core.unpack_mask(packed[1:].data_ptr(), width, bytes_[1:].data_ptr(), 3, columns, 2)
    assert (bytes_[1:4] == 1).all() and (bytes_[[0, 4]] == 7).all()


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
