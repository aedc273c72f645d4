// sparse_linear on a GPU, for few rows: 16 bits a kept weight and 1 a weight come from memory, and every bit has to
// find its value. What that costs are instructions and reads of shared memory, so the kernel is made around those two.
//
// A warp takes four outputs and walks along them by stages of 512 columns. Values and bits of the next stage are on
// their way while one is multiplied. Of a stage's bits a lane has two words: a scan over 8 lanes, for four outputs at
// once, says where the values of each half word begin, which goes into shared memory as one number beside the 16 bits.
//
// Then a lane takes four columns, a warp 128 of one output, whose values lie side by side: 128 bytes of shared memory
// at one half kept. The lane looks at its values from the middle: q is the place of the first one that belongs to its
// third column or a later one. What the first two columns may keep are values q - 2 and q - 1, the other two q and
// q + 1: two pairs as tensor cores take them, of which a shift and an AND make what is kept, without a loop over bits.
//
// Products are as in triton_kernels/sparse_linear.py: four weights of two outputs and the four x they meet are operands
// of mma as they are, and what the four lanes 4 g to 4 g + 3 add up lies on the diagonals of the product.
//
// What this does not serve (fp32, a number of columns that is no multiple of 4, x that 8-byte loads cannot read) takes
// a plain kernel: 32 columns a warp, a lane each.

#include "personafast/sparse_linear.h"

#include "elements.cuh"

namespace personafast {
namespace {

using namespace cuda;

constexpr int kOutputs = 4;  // of a warp
constexpr int kLanes = kWarp / kOutputs;
constexpr int kStageWords = 2 * kLanes;
constexpr int kStageColumns = 32 * kStageWords;
constexpr int kHalves = 2 * kStageWords;  // of words, with 16 bits each
constexpr int kStepColumns = 4 * kWarp;
constexpr int kStages = 2;  // that the ring has
constexpr int kMostRows = 8;
constexpr int kWarps = 4;

// An output's values of a stage: copied from a multiple of 32 bytes on, and surrounded by what may be read beside them.
constexpr int kBefore = 16;
constexpr int kChunks = (30 + 2 * kStageColumns + 15) / 16;
constexpr int kMostlyChunks = 5 * kLanes;  // enough at one half kept
constexpr int kValueBytes = kBefore + 16 * kChunks + 16;
constexpr int kStageBytes = kOutputs * (kValueBytes + 4 * kHalves);
static_assert(kWarps * kStages * kStageBytes <= 2 * 65536 - 4096, "a place in shared memory has 16 bits");

// Warps of a GPU that keep its memory busy. A constant, since the order of a sum follows from it.
constexpr int64_t kWantedWarps = 4096;
constexpr int64_t kLeastStages = 2;  // of a warp: copies of one are on their way while another is multiplied

struct Call {
  SparseLinearArgs a;
  int parts;  // warps that share an output's columns
  int rows;   // tiles of rows
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// Ones for the columns of a word that there are.
__device__ __forceinline__ uint32_t existing(int column, int features) {
  const int left = features - column;
  return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
}

// Where an output's values begin. Offsets that are not of these values: nothing outside them is read.
__device__ __forceinline__ int64_t first_value(const SparseLinearArgs& a, int64_t output) {
  return min(max(a.row_offsets[output], int64_t{0}), a.value_count);
}

// Adds the bias, rounds and stores, unless there is no such row or output.
template <Dtype D>
__device__ __forceinline__ void finish(const SparseLinearArgs& a, int64_t t, int64_t o, float sum) {
  if (t >= a.rows || o >= a.outputs) return;
  Elements<D, 1> rounded;
  rounded.set({a.bias ? sum + load<D, 1>(a.bias, o)[0] : sum});
  store(a.out, t * a.outputs + o, rounded);
}

// What a lane does for the stages of its warp: of one of the outputs it has two words of bits and every eighth chunk of
// values. In registers is what would be computed anew for every stage.
struct Source {
  uint32_t at;           // the lane among those of its output
  const int32_t* words;  // of the stage to come, the lane's
  int words_left;        // from there to the end of the row
  uint32_t bits[2];      // that these words have, those beyond the last column included
  uintptr_t next;        // address of the output's first value of the stage to come
  uintptr_t first_safe;  // between these two, whole chunks are values
  uintptr_t last_safe;
  uint32_t to;     // in the ring's first stage, the place of the output's values,
  uint32_t table;  // and that of the lane's part of the table

  __device__ __forceinline__ void load_bits() {
    bits[0] = words_left > 0 ? static_cast<uint32_t>(words[0]) : 0u;
    bits[1] = words_left > 1 ? static_cast<uint32_t>(words[1]) : 0u;
    words += kStageWords;
    words_left -= kStageWords;
  }
};

// Starts this lane's copies of the chunks First, First + 8, ... before Last, if they are among those left to copy.
template <int First, int Last>
__device__ __forceinline__ void copy_chunks(uint32_t to, const void* from, int left) {
#pragma unroll
  for (int i = First; i < Last; i += kLanes)
    copy16_async_if(i < left, to + 16 * i, static_cast<const char*>(from) + 16 * i);
}

// The same at the ends of `values`, one by one: what lies beside them is not read, and zeros are taken for it.
__device__ __forceinline__ void copy_edge(const SparseLinearArgs& a, uint32_t to, uintptr_t from, int left) {
  const uintptr_t values = reinterpret_cast<uintptr_t>(a.values);
#pragma unroll 1
  for (int i = 0; i < left; i += kLanes) {
    uint32_t words[4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uintptr_t at = from + 16 * i + 2 * k;
      if (at >= values && at - values < static_cast<uintptr_t>(2 * a.value_count)) {
        words[k / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(at)} << (16 * (k % 2));
      }
    }
    store16_shared(to + 16 * i, {words[0], words[1], words[2], words[3]});
  }
}

// Starts the copies of a stage's values and writes its table: for 16 columns the place of their first value in shared
// memory, in values, and their bits. The stage begins at `column`, and `stage` bytes behind the ring's first one.
__device__ __forceinline__ void begin_stage(const SparseLinearArgs& a, Source& source, int column, uint32_t stage) {
  if (column + kStageColumns > static_cast<int>(a.features)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      source.bits[i] &= existing(column + 64 * static_cast<int>(source.at) + 32 * i, static_cast<int>(a.features));
    }
  }
  uint32_t halves[4], counts[4], total = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    halves[i] = i % 2 ? source.bits[i / 2] >> 16 : source.bits[i / 2] & 0xffffu;
    counts[i] = static_cast<uint32_t>(__popc(halves[i]));
    total += counts[i];
  }
  uint32_t up_to = total;
#pragma unroll
  for (int by = 1; by < kLanes; by *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, up_to, by);
    if (source.at >= static_cast<uint32_t>(by)) up_to += below;
  }
  const uint32_t all = __shfl_sync(kAllLanes, up_to, static_cast<int>(threadIdx.x | (kLanes - 1)) % kWarp);

  // From a multiple of 32 bytes on, so that no access of memory is split between two copies.
  const uint32_t lead = static_cast<uint32_t>(source.next) & 31u;
  uint32_t place = (source.to + stage + lead) / 2 + up_to - total;
  uint32_t table[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    table[i] = place << 16 | halves[i];
    place += counts[i];
  }
  store16_shared(source.table + stage, {table[0], table[1], table[2], table[3]});

  const uintptr_t from = source.next - lead + 16 * source.at;
  const uint32_t to = opaque(source.to + stage + 16 * source.at);
  const int left = static_cast<int>((lead + 2 * all + 15) / 16 - source.at);
  const uintptr_t behind = source.next + 2 * all;
  const bool whole = source.next >= source.first_safe && behind <= source.last_safe;
  source.next = behind;
  if (whole) {
    const void* chunks = reinterpret_cast<const void*>(opaque_address(from));
    copy_chunks<0, kMostlyChunks>(to, chunks, left);
    if (left > kMostlyChunks) copy_chunks<kMostlyChunks, kChunks>(to, chunks, left);
  } else {
    copy_edge(a, to, from, left);
    source.next = min(behind, reinterpret_cast<uintptr_t>(a.values) + 2 * static_cast<uintptr_t>(a.value_count));
  }
  copies_commit();
}

// The four weights of a lane as two pairs: of the columns 4 n to 4 n + 3 of the 16 that `entry` stands for. `below` has
// a bit for each column up to the second one.
__device__ __forceinline__ void take_weights(uint32_t entry, int n, uint32_t below, uint32_t& low, uint32_t& high) {
  const uint32_t q = (entry >> 16) + static_cast<uint32_t>(__popc(entry & below));
  const uint32_t pair = 2 * q & ~3u;
  const uint32_t before = shared_word(pair - 4), middle = shared_word(pair), behind = shared_word(pair + 4);
  low = __funnelshift_r(before, middle, 16 * q);  // by the odd place or not at all: shifts are modulo 32
  high = __funnelshift_r(middle, behind, 16 * q);
  const uint32_t bits = __funnelshift_r(entry, entry, 4 * n - 1);  // from bit 1 on: four are taken at once from there
  if ((bits & 4u) == 0) low >>= 16;
  if ((bits & 2u) == 0) low &= 0xffff0000u;
  if ((bits & 8u) == 0) high <<= 16;
  if ((bits & 16u) == 0) high &= 0x0000ffffu;
}

template <Dtype D>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  D == Dtype::bf16 ? mma_bf16(d, a, b) : mma_f16(d, a, b);
}

template <Dtype D, int Rows>
__global__ void __launch_bounds__(kWarp* kWarps) sparse_linear_kernel(const __grid_constant__ Call c) {
  PERSONAFAST_DYNAMIC_SHARED(shared);
  const SparseLinearArgs& a = c.a;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int part = warp % c.parts;
  const int groups = kWarps / c.parts;  // of outputs, in a block
  const int64_t t0 = static_cast<int64_t>(blockIdx.x % c.rows) * Rows;
  const int64_t first_group = static_cast<int64_t>(blockIdx.x / c.rows) * groups;
  const int64_t o0 = (first_group + warp / c.parts) * kOutputs;

  const int features = static_cast<int>(a.features);
  const int stages = (features + kStageColumns - 1) / kStageColumns;
  const int of_part = (stages + c.parts - 1) / c.parts;
  const int begin = min(part * of_part, stages) * kStageColumns;
  const int end = min(begin + of_part * kStageColumns, features);

  // An output beyond the last one, and a row, are that one again: nobody looks at their sums.
  const int64_t output = min(o0 + lane / kLanes, a.outputs - 1);
  const int count = (features + 31) / 32;
  const int at = lane % kLanes;
  const uintptr_t values = reinterpret_cast<uintptr_t>(a.values);
  const uintptr_t values_end = values + 2 * static_cast<uintptr_t>(a.value_count);
  const int32_t* row_words = a.bitmap + output * count;
  const int64_t first_of_row = first_value(a, output);
  const uint32_t ring = shared_address(shared) + warp * kStages * kStageBytes;
  Source source;
  source.at = opaque(at);
  source.words = row_words + begin / 32 + 2 * at;
  source.words_left = count - begin / 32 - 2 * at;
  source.first_safe = opaque_address(values + (-values & 31));
  source.last_safe = opaque_address(values_end - (values_end & 15));
  source.to = opaque(ring + lane / kLanes * kValueBytes + kBefore);
  source.table = opaque(ring + kOutputs * kValueBytes + (lane / kLanes * kHalves + 4 * at) * 4);
  source.load_bits();
  int before = 0;  // what the parts before this one keep
#pragma unroll 4
  for (int word = at; word < (begin < end ? begin / 32 : 0); word += kLanes) {
    before += __popc(static_cast<uint32_t>(row_words[word]));
  }
#pragma unroll
  for (int bit = kLanes / 2; bit > 0; bit /= 2) before += __shfl_xor_sync(kAllLanes, before, bit);
  source.next = values + 2 * static_cast<uintptr_t>(min(first_of_row + before, a.value_count));

  uintptr_t x_rows[Rows];
#pragma unroll
  for (int t = 0; t < Rows; ++t) {
    const int64_t first = min(t0 + t, a.rows - 1) * a.x_stride + 4 * lane;
    x_rows[t] = opaque_address(reinterpret_cast<uintptr_t>(a.x) + 2 * static_cast<uintptr_t>(first));
  }
  const int n = lane % 4;
  const uint32_t below = (4u << (4 * n)) - 1u;
  float sums[kOutputs / 2][Rows][4] = {};
  if (begin < end) {
    begin_stage(a, source, begin, 0);
    source.load_bits();
  }
  const uint32_t entries_of_lane = opaque(ring + kOutputs * kValueBytes + lane / 4 * 4);
  uint32_t stage = 0;
  for (int first = begin; first < end; first += kStageColumns) {
    const uint32_t entries = opaque(entries_of_lane + stage);
    stage = kStageBytes - stage;
    if (first + kStageColumns < end) {
      begin_stage(a, source, first + kStageColumns, stage);
      source.load_bits();
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncwarp();
    const char* x_at[Rows];
#pragma unroll
    for (int t = 0; t < Rows; ++t) {
      x_at[t] = reinterpret_cast<const char*>(x_rows[t] + 2 * static_cast<uintptr_t>(first));
    }
#pragma unroll
    for (int step = 0; step < kStageColumns / kStepColumns; ++step) {
      const int column = first + step * kStepColumns;
      if (column >= end) break;
      uint32_t x[Rows][2];
#pragma unroll
      for (int t = 0; t < Rows; ++t) {
        uint2 pairs = {0, 0};
        if (column + 4 * lane < end) pairs = load8_read_only(x_at[t] + step * kStepColumns * 2);
        x[t][0] = pairs.x;
        x[t][1] = pairs.y;
      }
      uint32_t low[kOutputs], high[kOutputs];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const uint32_t entry = shared_word(entries + (o * kHalves + step * kStepColumns / 16) * 4);
        take_weights(entry, n, below, low[o], high[o]);
      }
#pragma unroll
      for (int pair = 0; pair < kOutputs / 2; ++pair) {
        const uint32_t w[4] = {low[2 * pair], low[2 * pair + 1], high[2 * pair], high[2 * pair + 1]};
#pragma unroll
        for (int t = 0; t < Rows; ++t) mma<D>(sums[pair][t], w, x[t]);
      }
    }
    __syncwarp();
  }

  // Lane 4 g + n has columns 2 n and 2 n + 1 of the products' rows g and g + 8; column g is wanted.
  float* partial = reinterpret_cast<float*>(shared + warp * kStages * kStageBytes);
  const int own = lane / 4 - 2 * n;
#pragma unroll
  for (int pair = 0; pair < kOutputs / 2; ++pair) {
#pragma unroll
    for (int t = 0; t < Rows; ++t) {
      const float (&d)[4] = sums[pair][t];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = warp_sum(own == 0 ? d[2 * i] : own == 1 ? d[2 * i + 1] : 0.0f);
        if (lane == 0) partial[t * kOutputs + 2 * pair + i] = sum;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < groups * Rows * kOutputs; i += blockDim.x) {
    const int group = i / (Rows * kOutputs), of = i % (Rows * kOutputs);
    float sum = 0.0f;
    for (int k = 0; k < c.parts; ++k) {
      sum += reinterpret_cast<const float*>(shared + (group * c.parts + k) * kStages * kStageBytes)[of];
    }
    finish<D>(a, t0 + of / kOutputs, (first_group + group) * kOutputs + of % kOutputs, sum);
  }
}

constexpr int kPlainRows = 4;
constexpr int kPlainWords = 4;  // on their way at once
constexpr int kPlainWarps = 4;

template <Dtype D>
__global__ void __launch_bounds__(kWarp* kPlainWarps) sparse_linear_plain_kernel(const __grid_constant__ Call c) {
  const SparseLinearArgs& a = c.a;
  const int lane = threadIdx.x % kWarp;
  const int64_t t0 = static_cast<int64_t>(blockIdx.x % c.rows) * kPlainRows;
  const int64_t o = static_cast<int64_t>(blockIdx.x / c.rows) * kPlainWarps + threadIdx.x / kWarp;
  if (o >= a.outputs) return;
  const int features = static_cast<int>(a.features);
  const int32_t* words = a.bitmap + o * ((a.features + 31) / 32);
  int64_t next = first_value(a, o);
  int64_t row[kPlainRows];
  float sums[kPlainRows] = {};
#pragma unroll
  for (int t = 0; t < kPlainRows; ++t) row[t] = min(t0 + t, a.rows - 1) * a.x_stride;
  for (int first = 0; first < features; first += 32 * kPlainWords) {
    uint32_t bits[kPlainWords];
    float w[kPlainWords];
#pragma unroll
    for (int i = 0; i < kPlainWords; ++i) {
      const int column = first + 32 * i;
      bits[i] = column < features ? static_cast<uint32_t>(words[column / 32]) & existing(column, features) : 0;
    }
#pragma unroll
    for (int i = 0; i < kPlainWords; ++i) {
      const int64_t place = next + __popc(bits[i] & ((1u << lane) - 1u));
      w[i] = load_if<D, 1>((bits[i] >> lane & 1u) != 0 && place < a.value_count, a.values, place)[0];
      next += __popc(bits[i]);
    }
#pragma unroll
    for (int i = 0; i < kPlainWords; ++i) {
      const int column = first + 32 * i + lane;
#pragma unroll
      for (int t = 0; t < kPlainRows; ++t) {
        sums[t] = fmaf(w[i], load_if<D, 1>(column < features, a.x, row[t] + column)[0], sums[t]);
      }
    }
  }
  float mine = 0.0f;
#pragma unroll
  for (int t = 0; t < kPlainRows; ++t) {
    const float sum = warp_sum(sums[t]);
    if (lane == t) mine = sum;
  }
  if (lane < kPlainRows) finish<D>(a, t0 + lane, o, mine);
}

// CUDA's own code for a launch of more blocks than there can be.
constexpr int kInvalidConfiguration = 9;

int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int start(void (*kernel)(Call), const SparseLinearArgs& a, int64_t parts, int64_t rows, int64_t blocks, int64_t warps,
          int64_t shared_bytes, void* stream) {
  if (rows > INT32_MAX || blocks > INT32_MAX / rows || a.features > INT32_MAX / 2) return kInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(rows * blocks));
  const dim3 block(static_cast<unsigned>(warps * kWarp));
  const Call call = {a, static_cast<int>(parts), static_cast<int>(rows)};
  return launch(kernel, grid, block, static_cast<size_t>(shared_bytes), stream, call);
}

template <Dtype D>
int run_plain(const SparseLinearArgs& a, void* stream) {
  return start(sparse_linear_plain_kernel<D>, a, 1, cdiv(a.rows, kPlainRows), cdiv(a.outputs, kPlainWarps), kPlainWarps,
               0, stream);
}

template <Dtype D, int Rows>
int run_rows(const SparseLinearArgs& a, void* stream) {
  // How an output's columns are split among warps, which is the order of its sum, follows from the weight's shape.
  const int64_t groups = cdiv(a.outputs, kOutputs);
  const int64_t stages = cdiv(a.features, kStageColumns);
  int64_t parts = 1;
  while (parts < kWarps && 2 * parts * kLeastStages <= stages && groups * parts < kWantedWarps) parts *= 2;
  return start(sparse_linear_kernel<D, Rows>, a, parts, cdiv(a.rows, Rows), cdiv(groups * parts, kWarps), kWarps,
               kWarps * kStages * kStageBytes, stream);
}

template <Dtype D>
int run(const SparseLinearArgs& a, void* stream) {
  if constexpr (D == Dtype::f32) {
    return run_plain<D>(a, stream);
  } else {
    const bool wide = reinterpret_cast<uintptr_t>(a.x) % 8 == 0 && a.x_stride % 4 == 0 && a.features % 4 == 0;
    if (!wide) return run_plain<D>(a, stream);
    if (a.rows == 1) return run_rows<D, 1>(a, stream);
    if (a.rows == 2) return run_rows<D, 2>(a, stream);
    return a.rows <= 4 ? run_rows<D, 4>(a, stream) : run_rows<D, kMostRows>(a, stream);
  }
}

}  // namespace

int sparse_linear_cuda(const SparseLinearArgs& a, void* stream) {
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
