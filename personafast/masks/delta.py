"""In what one mask of a linear differs from another, in little more bits than its entropy.

The differing bits' places, ascending, are stored as gaps g_i = place_i - place_(i-1) - 1 >= 0 in a Rice code: the k low
bits of the gaps, a plane of bits for each, then the quotients g_i >> k in unary, a one closing each. Where a share p of
the bits differs at random, gaps are geometric and a difference costs k + 1 + q^(2^k) / (1 - q^(2^k)) bits, q = 1 - p:
7.7 bits at 1.34 %, where the entropy is 7.6. All of it is flat strings of bits, decoded by a few array operations.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

from personafast.errors import FormatError

# Number of differing bits, and k.
_HEAD = struct.Struct("<QB")
HEAD_BYTES = _HEAD.size
_MOST_LOW_BITS = 31
_POWERS = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))


def encode(words: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The difference of two masks of one linear.

    Args:
        words: int32 [out, W].
        base: int32 [out, W].

    Returns:
        uint8 [n]: 8 bytes for the number of differing bits, one for k, the planes of low bits, each to a whole byte,
        the quotients; little-endian, least significant bit first.
    """
    places = _places(_flat(words) ^ _flat(base))
    gaps = np.diff(places, prepend=-1) - 1
    low_bits = _best_low_bits(gaps)
    planes = [gaps >> place & 1 for place in range(low_bits)]
    ends = np.cumsum(gaps >> low_bits) + np.arange(len(gaps))
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    unary[ends] = 1
    parts = [np.packbits(bits.astype(np.uint8), bitorder="little") for bits in (*planes, unary)]
    return torch.from_numpy(np.concatenate([np.frombuffer(_HEAD.pack(len(gaps), low_bits), dtype=np.uint8), *parts]))


def decode(stream: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Undo `encode`: int32 [out, W] from its uint8 [n] and the same base.

    Raises:
        FormatError: the stream is cut short, or reaches beyond the base.
    """
    data = stream.numpy()
    if len(data) < HEAD_BYTES:
        raise FormatError("a difference of masks is cut short")
    count, low_bits = _HEAD.unpack(data[:HEAD_BYTES].tobytes())
    found = _flat(base).copy()
    if low_bits > _MOST_LOW_BITS or count > 32 * len(found):
        raise FormatError("a difference of masks does not fit its base")
    plane = -(-count // 8)
    split = HEAD_BYTES + low_bits * plane
    ends = np.flatnonzero(np.unpackbits(data[split:], bitorder="little").view(bool))
    if len(data) < split or len(ends) != count:
        raise FormatError("a difference of masks is cut short or damaged")
    if count:
        # ends[i] - i is the sum of the first i + 1 quotients.
        order = np.arange(count)
        ends -= order
        ends <<= low_bits
        places = np.cumsum(_numbers(data[HEAD_BYTES:split].reshape(low_bits, plane), count), dtype=np.int64)
        places += ends
        places += order
        if places[-1] >= 32 * len(found):
            raise FormatError("a difference of masks does not fit its base")
        _flip(found, places)
    return torch.from_numpy(found.view(np.int32)).view(base.shape)


def expected_bytes(weights: int, share: float) -> float:
    """Bytes of `encode` for a linear of `weights` weights of which a random share differs.

    The number of low bits is the best one for that share.
    """
    count = weights * share
    if not 0 < share < 1:
        return HEAD_BYTES + (weights / 8 if share else 0)

    def bits(low_bits: int) -> float:
        # P(g >= 2^k) = (1 - p)^(2^k); the quotient of a geometric number is geometric too.
        longer = math.exp(2**low_bits * math.log1p(-share))
        return low_bits + 1 + longer / (1 - longer)

    return HEAD_BYTES + count * min(bits(low_bits) for low_bits in range(_MOST_LOW_BITS + 1)) / 8


def _flat(words: torch.Tensor) -> np.ndarray:
    array: np.ndarray = words.detach().cpu().contiguous().numpy().view(np.uint32).reshape(-1)
    return array


def _places(different: np.ndarray) -> np.ndarray:
    """Indices of the set bits of uint32 words."""
    where = np.flatnonzero(different)
    bits = np.unpackbits(different[where].astype("<u4").view(np.uint8), bitorder="little")
    ones = np.flatnonzero(bits)
    return where[ones >> 5] * 32 + (ones & 31)


def _best_low_bits(gaps: np.ndarray) -> int:
    if not len(gaps):
        return 0
    # Of a geometric gap the best k is near log2(mean ln 2); its neighbours are counted exactly.
    near = max(int(math.log2(max(float(gaps.mean()) * math.log(2), 1.0))), 0)
    tried = range(max(near - 1, 0), min(near + 3, _MOST_LOW_BITS + 1))
    return min(tried, key=lambda low_bits: len(gaps) * low_bits + int((gaps >> low_bits).sum()))


def _numbers(planes: np.ndarray, count: int) -> np.ndarray:
    """Packed planes of bits, uint8 [k, ceil(count / 8)], least significant first, as `count` numbers."""
    # The narrower the numbers, the less memory is touched.
    width = np.dtype(np.uint8 if len(planes) <= 8 else np.uint32)
    found: np.ndarray = np.zeros(count, dtype=width)
    for place, plane in enumerate(planes):
        bits = np.unpackbits(plane, count=count, bitorder="little").astype(width)
        np.bitwise_or(found, np.left_shift(bits, place, dtype=width), out=found)
    return found


def _flip(words: np.ndarray, places: np.ndarray) -> None:
    """Flip ascending bit places of uint32 words, in place."""
    at = places >> 5
    first = np.concatenate([[0], np.flatnonzero(at[1:] != at[:-1]) + 1])
    bits = _POWERS[places & 31]
    words[at[first]] ^= np.bitwise_or.reduceat(bits, first)
