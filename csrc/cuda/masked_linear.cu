// masked_linear on a GPU, for few rows: the weight is read once for 8 of them, 2 + P / 8 bytes a weight.
//
// With a mask for every row it is the masks that cost: a weight is looked at once for each. On tensor cores the
// products are free, so what is left is to make zeros of weights, and that takes one instruction for two of them beside
// one that picks their bits:
//
//   picked = word & (bit p of both halves) | C    two numbers that are C, or C + 1 where the bit is set
//   fma(w, picked, -w C)                          w (picked - C), which is w or 0, exactly
//
// C is the power of two in whose fraction bit p counts 1, and -w C is made once for all masks. That is exact unless w C
// overflows or w is infinite or NaN. Then the result is not finite either, and one that is not, for whatever reason, is
// computed again as its definition has it.
//
// A warp takes 16 outputs of 8 rows, every fourth 256 columns of them. Weights and masks come through shared memory, of
// which each warp has its own and is ahead by one such tile; x comes from L1, since every block reads the same. A lane
// has all 32 columns of a mask's word, and since the order of columns is free, pairs are those 16 columns apart, as the
// two bits picked are. Rows of the same mask share its products: of what a tensor core computes for all 8 rows, each
// row takes the sums that are of its mask. The dense weight is one of the masks, of ones.
//
// What the tensor cores do not serve, fp32 and rows that 16 bytes do not divide, takes a kernel without them.

#include "personafast/masked_linear.h"

#include "elements.cuh"

namespace personafast {
namespace {

using namespace cuda;

constexpr int kTileRows = 8;
constexpr int kTileOutputs = 16;
constexpr int kTileColumns = 256;
constexpr int kTileWords = kTileColumns / 32;
constexpr int kStages = 2;
constexpr int kMostWarps = 4;

constexpr int kWeightBytes = kTileOutputs * kTileColumns * 2;
constexpr int kMaskBytes = kTileOutputs * kTileWords * 4;

constexpr int32_t kNoRow = -2;

// No slot and a wrong one are -1.
__device__ __forceinline__ int32_t slot_of(const MaskedLinearArgs& a, int64_t t) {
  if (t >= a.rows) return kNoRow;
  const int32_t slot = a.slots ? a.slots[t] : -1;
  return slot >= 0 && slot < a.personas ? slot : -1;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// The sums of a warp for Rows rows from t0 and Outputs outputs from o0 on, in every lane. A lane takes N columns at a
// time. Rows and outputs beyond the last one are that one again.
template <Dtype D, int N, int Rows, int Outputs>
__device__ __forceinline__ void plain_sums(const MaskedLinearArgs& a, int64_t t0, int64_t o0,
                                           float (&sums)[Rows][Outputs]) {
  const int64_t words = (a.features + 31) / 32;
  int64_t output[Outputs], row[Rows];
  int32_t slot[Rows];
  float gamma[Rows];
#pragma unroll
  for (int o = 0; o < Outputs; ++o) output[o] = min(o0 + o, a.outputs - 1);
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    row[r] = min(t0 + r, a.rows - 1);
    slot[r] = slot_of(a, row[r]);
    gamma[r] = slot[r] >= 0 && a.gamma ? a.gamma[slot[r]] : 0.0f;
#pragma unroll
    for (int o = 0; o < Outputs; ++o) sums[r][o] = 0.0f;
  }
  for (int64_t column = threadIdx.x % kWarp * N; column < a.features; column += kWarp * N) {
    Elements<D, N> w[Outputs];
#pragma unroll
    for (int o = 0; o < Outputs; ++o) w[o] = load<D, N>(a.weight, output[o] * a.weight_stride + column);
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const Elements<D, N> x = load<D, N>(a.x, row[r] * a.x_stride + column);
#pragma unroll
      for (int o = 0; o < Outputs; ++o) {
        uint32_t bits = ~0u;
        if (slot[r] >= 0) {
          const int64_t word = (slot[r] * a.outputs + output[o]) * words + column / 32;
          bits = static_cast<uint32_t>(a.masks[word]) >> (column % 32);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (bits >> i & 1u) {
            sums[r][o] = fmaf(w[o][i], x[i], sums[r][o]);
          } else if (a.gamma) {
            sums[r][o] = fmaf(w[o][i] * gamma[r], x[i], sums[r][o]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int o = 0; o < Outputs; ++o) sums[r][o] = warp_sum(sums[r][o]);
  }
}

// Adds the bias, rounds and stores, unless there is no such row or output.
template <Dtype D>
__device__ __forceinline__ void finish(const MaskedLinearArgs& a, int64_t t, int64_t o, float sum) {
  if (t >= a.rows || o >= a.outputs) return;
  Elements<D, 1> rounded;
  rounded.set({a.bias ? sum + load<D, 1>(a.bias, o)[0] : sum});
  store(a.out, t * a.outputs + o, rounded);
}

constexpr int kPlainRows = 4;
constexpr int kPlainOutputs = 2;

template <Dtype D, int N>
__global__ void __launch_bounds__(kWarp* kMostWarps)
    masked_linear_plain_kernel(const __grid_constant__ MaskedLinearArgs a) {
  const int64_t tiles = (a.rows + kPlainRows - 1) / kPlainRows;
  const int64_t t0 = blockIdx.x % tiles * kPlainRows;
  const int64_t o0 = (blockIdx.x / tiles * kMostWarps + threadIdx.x / kWarp) * kPlainOutputs;
  float sums[kPlainRows][kPlainOutputs];
  plain_sums<D, N>(a, t0, o0, sums);
  float mine = 0.0f;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kPlainRows * kPlainOutputs; ++i) {
    if (lane == i) mine = sums[i / kPlainOutputs][i % kPlainOutputs];
  }
  if (lane < kPlainRows * kPlainOutputs) finish<D>(a, t0 + lane / kPlainOutputs, o0 + lane % kPlainOutputs, mine);
}

// Of a pair's numbers each is kept where bit `kPlace` of its half of the word, shifted by kShift, is set.
template <Dtype D, int Pair>
struct Keep {
  static constexpr int kMantissa = D == Dtype::bf16 ? 7 : 10;
  static constexpr int kBias = D == Dtype::bf16 ? 127 : 15;
  static constexpr int kPlace = Pair % kMantissa;
  static constexpr int kShift = Pair - kPlace;
  static constexpr uint32_t kBits = 0x00010001u << kPlace;
  static constexpr uint32_t kBase = 0x00010001u * (static_cast<uint32_t>(kBias + kMantissa - kPlace) << kMantissa);
  // All bits of both exponents: with these set first, one AND leaves of a word kBits, and kBase.
  static constexpr uint32_t kExponents = 0x80008000u - (0x00010001u << kMantissa);
};

template <Dtype D>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  return D == Dtype::bf16 ? fma_bf16x2(a, b, c) : fma_f16x2(a, b, c);
}

template <Dtype D>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  D == Dtype::bf16 ? mma_bf16(d, a, b) : mma_f16(d, a, b);
}

// 32 adjacent columns as pairs of columns i and i + 16.
using Columns = uint32_t[16];

__device__ __forceinline__ void pair_columns(const uint4 (&chunks)[4], Columns& pairs) {
  const uint32_t low[8] = {chunks[0].x, chunks[0].y, chunks[0].z, chunks[0].w,
                           chunks[1].x, chunks[1].y, chunks[1].z, chunks[1].w};
  const uint32_t high[8] = {chunks[2].x, chunks[2].y, chunks[2].z, chunks[2].w,
                            chunks[3].x, chunks[3].y, chunks[3].z, chunks[3].w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    pairs[2 * i] = __byte_perm(low[i], high[i], 0x5410);
    pairs[2 * i + 1] = __byte_perm(low[i], high[i], 0x7632);
  }
}

// -w C for the pairs from `Pair` on.
template <Dtype D, int Pair = 0>
__device__ __forceinline__ void take_base(const Columns& w, Columns& less) {
  if constexpr (Pair < 16) {
    less[Pair] = fma_pair<D>(w[Pair], Keep<D, Pair>::kBase | 0x80008000u, 0x80008000u);
    take_base<D, Pair + 1>(w, less);
  }
}

// The pair's numbers, or 0 where its bit in `word` is not set.
template <Dtype D, int Pair>
__device__ __forceinline__ uint32_t keep(uint32_t word, const Columns& w, const Columns& less) {
  using K = Keep<D, Pair>;
  // Or the compiler would do AND and OR for every pair.
  const uint32_t raised = opaque((word >> K::kShift) | K::kExponents);
  return fma_pair<D>(w[Pair], raised & (K::kBits | K::kBase), less[Pair]);
}

// Adds to sums of two outputs and 8 rows the products under `words`: to one of the two and the other by turns, so that
// a tensor core need not wait for its last sum; with Soft all to the first, and to the second those of the other
// weights.
template <Dtype D, bool Soft, int Pair = 0>
__device__ __forceinline__ void multiply(const uint32_t (&words)[2], const Columns (&w)[2], const Columns (&less)[2],
                                         const Columns& x, float (&sums)[2][4]) {
  if constexpr (Pair < 16) {
    const uint32_t b[2] = {x[Pair], x[Pair + 1]};
    const uint32_t a[4] = {keep<D, Pair>(words[0], w[0], less[0]), keep<D, Pair>(words[1], w[1], less[1]),
                           keep<D, Pair + 1>(words[0], w[0], less[0]), keep<D, Pair + 1>(words[1], w[1], less[1])};
    mma<D>(sums[Soft ? 0 : Pair / 2 % 2], a, b);
    if constexpr (Soft) {
      constexpr uint32_t kMinus = D == Dtype::bf16 ? 0xbf80bf80u : 0xbc00bc00u;  // -1, twice
      const uint32_t rest[4] = {fma_pair<D>(a[0], kMinus, w[0][Pair]), fma_pair<D>(a[1], kMinus, w[1][Pair]),
                                fma_pair<D>(a[2], kMinus, w[0][Pair + 1]), fma_pair<D>(a[3], kMinus, w[1][Pair + 1])};
      mma<D>(sums[1], rest, b);
    }
    multiply<D, Soft, Pair + 2>(words, w, less, x, sums);
  }
}

// A warp's stage of shared memory: 16 rows of 32 chunks of weights, and for every row of x 16 rows of words. Chunks are
// moved within their four, so that the lanes of one access, two rows and four words, read from different banks.
__device__ __forceinline__ int chunk_place(int row, int chunk) {
  return (row * (kTileColumns / 8) + (chunk ^ ((chunk >> 3 & 1) | (row & 1) << 1))) * 16;
}

// What a warp has of the weight and the masks.
struct Tile {
  int features;
  int words;
  unsigned leaders;  // rows that are the first of their slot
  unsigned masked;   // those of them that have a mask
  int64_t row_bytes;
  const char* weight;            // the first of its outputs
  const char* masks[kTileRows];  // likewise, of each leader's
};

// Starts the copies of the columns from `first` on. Columns beyond the last one become zeros.
template <bool Aligned>
__device__ __forceinline__ void copy_stage(const Tile& tile, unsigned char* stage, int first) {
  const int lane = threadIdx.x % kWarp;
  const int column = first + 8 * lane;
  const char* weight = tile.weight + int64_t{column} * 2;
  if (column < tile.features) {
#pragma unroll
    for (int row = 0; row < kTileOutputs; ++row, weight += tile.row_bytes) {
      copy16_async(stage + chunk_place(row, lane), weight);
    }
  } else {
#pragma unroll
    for (int row = 0; row < kTileOutputs; ++row) store16(stage + chunk_place(row, lane), {0, 0, 0, 0});
  }
  unsigned char* masks = stage + kWeightBytes;
  if constexpr (Aligned) {
    // Half of what an output has of the tile.
    const int row = lane / 2, word = lane % 2 * 4;
    if (first / 32 + word >= tile.words) return;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if ((tile.masked >> r & 1u) == 0) continue;
      copy16_async(masks + r * kMaskBytes + lane * 16,
                   tile.masks[r] + (int64_t{row} * tile.words + first / 32 + word) * 4);
    }
  } else {
    const int word = lane % 8;
    if (first / 32 + word >= tile.words) return;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if ((tile.masked >> r & 1u) == 0) continue;
      for (int row = lane / 8; row < kTileOutputs; row += 4) {
        copy4_async(masks + r * kMaskBytes + (row * kTileWords + word) * 4,
                    tile.masks[r] + (int64_t{row} * tile.words + first / 32 + word) * 4);
      }
    }
  }
}

// This lane's 32 columns from `column` on of a row of x.
__device__ __forceinline__ void load_x(const char* row, int column, int features, uint4 (&chunks)[4]) {
  const char* at = row + int64_t{column} * 2;
  if (column + 32 <= features) {
#pragma unroll
    for (int j = 0; j < 4; ++j) chunks[j] = load16_read_only(at + 16 * j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      chunks[j] = {0, 0, 0, 0};
      if (column + 8 * j < features) chunks[j] = load16_read_only(at + 16 * j);
    }
  }
}

// Aligned: words of masks can be copied by fours.
template <Dtype D, bool Soft, bool Aligned>
__global__ void __launch_bounds__(kWarp* kMostWarps) masked_linear_kernel(const __grid_constant__ MaskedLinearArgs a) {
  PERSONAFAST_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, c = lane % 4;  // as operands of tensor cores are laid out: row and column of x or weights
  const int64_t row_tiles = (a.rows + kTileRows - 1) / kTileRows;
  const int64_t t0 = blockIdx.x % row_tiles * kTileRows;
  // The last tile begins sooner, so that it is whole. What it has in common with the one before it, that one stores.
  const int64_t o_first = blockIdx.x / row_tiles * kTileOutputs;
  const int64_t o0 = min(o_first, a.outputs - kTileOutputs);
  const int stage_bytes = kWeightBytes + kMaskBytes * static_cast<int>(min(a.rows, int64_t{kTileRows}));
  unsigned char* ring = shared + warp * kStages * stage_bytes;

  const int32_t slot = lane < kTileRows ? slot_of(a, t0 + lane) : kNoRow;
  bool leads = slot != kNoRow;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int32_t other = __shfl_sync(kAllLanes, slot, r);
    if (r < lane && other == slot) leads = false;
  }
  Tile tile;
  tile.features = static_cast<int>(a.features);
  tile.words = (tile.features + 31) / 32;
  tile.leaders = __ballot_sync(kAllLanes, leads);
  tile.masked = __ballot_sync(kAllLanes, leads && slot >= 0);
  tile.row_bytes = a.weight_stride * 2;
  tile.weight = static_cast<const char*>(a.weight) + o0 * tile.row_bytes;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t persona = __shfl_sync(kAllLanes, slot, r);
    tile.masks[r] = nullptr;
    if (tile.masked >> r & 1u) {
      tile.masks[r] = reinterpret_cast<const char*>(a.masks + (persona * a.outputs + o0) * tile.words);
    } else if (tile.leaders >> r & 1u) {  // the dense weight: ones, which nothing is copied over
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        store16(ring + i * stage_bytes + kWeightBytes + r * kMaskBytes + lane * 16, {~0u, ~0u, ~0u, ~0u});
      }
    }
  }

  const int step = warps * kTileColumns;
  const int begin = warp * kTileColumns;
  float sums[kTileRows][2][4] = {};
  int places[4];  // of the lane's chunks of a row's half
#pragma unroll
  for (int j = 0; j < 4; ++j) places[j] = static_cast<int>(opaque(chunk_place(g, 4 * c + j)));
  const int mask_place = static_cast<int>(opaque((g * kTileWords + c) * 4));
  // A row that there is not is the last one again: nobody looks at its sums.
  const char* x_row = static_cast<const char*>(a.x) + min(t0 + g, a.rows - 1) * a.x_stride * 2;
  int column = begin + 32 * c;
  uint4 x_chunks[4];
  load_x(x_row, column, tile.features, x_chunks);
  copy_stage<Aligned>(tile, ring, begin);
  copies_commit();
  int current = 0;
  for (int first = begin; first < tile.features; first += step, current ^= 1) {
    if (first + step < tile.features) copy_stage<Aligned>(tile, ring + (current ^ 1) * stage_bytes, first + step);
    copies_commit();
    copies_wait<1>();
    __syncwarp();
    const unsigned char* weights = ring + current * stage_bytes;
    const unsigned char* masks = weights + kWeightBytes + mask_place;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      Columns w[2], less[2], x;
      pair_columns(x_chunks, x);
      // The next ones are on their way while these are multiplied.
      column += half == 0 ? kTileColumns / 2 : step - kTileColumns / 2;
      load_x(x_row, column, tile.features, x_chunks);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 chunks[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) chunks[j] = load16(weights + places[j] + i * (kWeightBytes / 2));
        pair_columns(chunks, w[i]);
        take_base<D>(w[i], less[i]);
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if ((tile.leaders >> r & 1u) == 0) continue;
        const uint32_t words[2] = {*reinterpret_cast<const uint32_t*>(masks + r * kMaskBytes),
                                   *reinterpret_cast<const uint32_t*>(masks + r * kMaskBytes + kMaskBytes / 2)};
        multiply<D, Soft>(words, w, less, x, sums[r]);
      }
      weights += kTileColumns / 2 * 2;
      masks += kTileWords / 2 * 4;
    }
    __syncwarp();
  }

  // Columns 2c and 2c + 1 of the products are two rows of x; each has its sums where the first row of its slot is.
  float own[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t of = __shfl_sync(kAllLanes, slot, 2 * c + i % 2);
    const float gamma = Soft && of >= 0 ? a.gamma[of] : 1.0f;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const int32_t other = __shfl_sync(kAllLanes, slot, r);
      if ((tile.leaders >> r & 1u) != 0 && other == of) own[i] = fmaf(gamma, sums[r][1][i], sums[r][0][i]);
    }
  }
  copies_wait<0>();
  float* partial = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int i = 0; i < 4; ++i) partial[(2 * c + i % 2) * kTileOutputs + g + i / 2 * 8] = own[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTileRows * kTileOutputs; i += blockDim.x) {
    const int64_t t = t0 + i / kTileOutputs, o = o0 + i % kTileOutputs;
    float sum = 0.0f;
    for (int k = 0; k < warps; ++k) sum += reinterpret_cast<float*>(shared + k * kStages * stage_bytes)[i];
    const bool wanted = t < a.rows && o >= o_first;
    unsigned again = __ballot_sync(kAllLanes, wanted && (bits_of(sum) & 0x7f800000u) == 0x7f800000u);
    for (int from = 0; again != 0; ++from, again >>= 1) {
      if ((again & 1u) == 0) continue;
      float exact[1][1];
      const int of = i - lane + from;
      plain_sums<D, 1>(a, t0 + of / kTileOutputs, o0 + of % kTileOutputs, exact);
      if (lane == from) sum = exact[0][0];
    }
    if (wanted) finish<D>(a, t, o, sum);
  }
}

template <Dtype D, int N>
int run_plain(const MaskedLinearArgs& a, void* stream) {
  const int64_t tiles = (a.rows + kPlainRows - 1) / kPlainRows;
  const int64_t outputs = kMostWarps * kPlainOutputs;
  const dim3 grid(static_cast<unsigned>(tiles * ((a.outputs + outputs - 1) / outputs)));
  return launch(masked_linear_plain_kernel<D, N>, grid, dim3(kWarp * kMostWarps), 0, stream, a);
}

template <Dtype D>
int run(const MaskedLinearArgs& a, void* stream) {
  const bool wide =
      rows_are_wide(a.x, a.x_stride, a.features, D) && rows_are_wide(a.weight, a.weight_stride, a.features, D);
  if (!wide) return run_plain<D, 1>(a, stream);
  if constexpr (D == Dtype::f32) {
    return run_plain<D, kWide<D>>(a, stream);
  } else {
    if (a.outputs < kTileOutputs || a.features == 0 || a.features > INT32_MAX / 2)
      return run_plain<D, kWide<D>>(a, stream);
    // How a row's columns are split among warps, which is the order of its sum, follows from their number alone.
    const int64_t stages = (a.features + kTileColumns - 1) / kTileColumns;
    const int64_t warps = stages < kMostWarps ? stages : kMostWarps;
    const int64_t row_tiles = (a.rows + kTileRows - 1) / kTileRows;
    const int64_t masks = a.rows < kTileRows ? a.rows : kTileRows;
    const dim3 grid(static_cast<unsigned>(row_tiles * ((a.outputs + kTileOutputs - 1) / kTileOutputs)));
    const dim3 block(static_cast<unsigned>(warps * kWarp));
    const size_t bytes = static_cast<size_t>(warps * kStages * (kWeightBytes + masks * kMaskBytes));
    const bool aligned = a.features % 128 == 0 && reinterpret_cast<uintptr_t>(a.masks) % 16 == 0;
    if (a.gamma) {
      return aligned ? launch(masked_linear_kernel<D, true, true>, grid, block, bytes, stream, a)
                     : launch(masked_linear_kernel<D, true, false>, grid, block, bytes, stream, a);
    }
    return aligned ? launch(masked_linear_kernel<D, false, true>, grid, block, bytes, stream, a)
                   : launch(masked_linear_kernel<D, false, false>, grid, block, bytes, stream, a);
  }
}

}  // namespace

int masked_linear_cuda(const MaskedLinearArgs& a, void* stream) {
  if (a.rows == 0 || a.outputs == 0) return 0;
  switch (a.dtype) {
    case Dtype::f32:
      return run<Dtype::f32>(a, stream);
    case Dtype::bf16:
      return run<Dtype::bf16>(a, stream);
    case Dtype::f16:
      return run<Dtype::f16>(a, stream);
  }
  return 0;
}

}  // namespace personafast
