// lora_delta_ on a GPU, for the few rows of a step of decoding: there it is not bytes that cost (a quarter of a
// megabyte an adapter of rank 16) but launches and waits, one after the other. Two launches, A x and then B, wait for
// memory twice and for each other once.
//
// Here it is one launch, of clusters of 8 blocks. A cluster belongs to one adapter of a tile of 8 rows. Each of its
// blocks takes an eighth of the features, and sends what they add to A x into the shared memory of all 8; then it takes
// a share of the outputs, for which B, `out` and the scale are there already. So A is read once a cluster and not once
// a block, which at 64 bytes a clock would be a microsecond for rank 16 alone; and what stands in place of the second
// launch is the way from one multiprocessor to another. A mailbox counts what has come, so that nobody fences.
//
// The host knows neither the adapters in use nor how many there are. Every warp finds them in the slots, eight numbers,
// and the clusters of a tile share them out: cluster n takes adapter n modulo their number, and of its outputs the part
// that follows from how many took it before. So a batch of one adapter keeps as many blocks busy as one of eight. The
// ranks of the first 32 adapters come with the slots, which saves a wait: A and B are asked for as soon as both are
// there.
//
// bf16 and fp16 multiply A x on tensor cores, the ranks being the rows of the instruction and the batch its columns,
// loaded from memory into registers as the instruction wants them, since the order of columns is free. B goes through a
// ring of shared memory that is its lane's own: a lane has 16 bytes of outputs for every eighth rank, and 8 lanes are
// added up in the end. The sums of A x stay fp32. Rows that 16 bytes do not divide go number by number.
//
// The order of all sums follows from the shapes alone. Before compute capability 9.0 the same kernel is launched twice:
// the first stops at the sums of its features, which the second reads.

#include "personafast/lora_delta.h"

#include <type_traits>

#include "elements.cuh"

namespace personafast {
namespace {

using namespace cuda;

constexpr int kTileRows = 8;
constexpr int kBlocks = 8;  // of a cluster
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

// Columns that a warp multiplies at a time on tensor cores.
constexpr int kStepColumns = 64;

// The lanes of a warp are 4 neighbours in the outputs times 8 ranks.
constexpr int kRankLanes = 8;
constexpr int kOutputLanes = kWarp / kRankLanes;

// Rows that are multiplied by B at a time.
constexpr int kGroup = 4;

// Adapters whose ranks are fetched before it is known who is in use.
constexpr int kEarly = kWarp;

enum class Part { whole, shrink, expand };

struct Launched {
  LoraDeltaCudaArgs args;
  Part part;
  unsigned clusters;  // for a tile of rows
};

// Ranks: the most there can be.
template <Dtype D, int Ranks, bool Wide>
struct Shape {
  static constexpr int kRankSteps = Ranks / kRankLanes;
  static constexpr int kLaneOutputs = Wide ? kWide<D> : 1;
  static constexpr int kTileOutputs = Wide ? kOutputLanes * kWide<D> : kWarp;
  static constexpr int kStageBytes = kRankSteps * kWarp * 16;
  static constexpr int kStages = Ranks > 16 ? 2 : 4;
  // Between the numbers of two rows: those that tensor cores leave go to different banks.
  static constexpr int kRow = Ranks + 4;
  static constexpr int kSums = kTileRows * kRow;

  static constexpr size_t kRingBytes = Wide ? size_t{kWarps} * kStages * kStageBytes : 0;
  static constexpr size_t kSharedBytes = kRingBytes + size_t{kWarps + kBlocks} * kSums * sizeof(float) + 8;
};

// The place of the lowest bit that is set.
__device__ __forceinline__ int lowest(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }

// What a cluster does.
struct Task {
  int64_t tile;
  int64_t adapter;
  int count;      // rows of the tile that have it
  uint32_t rows;  // which those are, 4 bits each
  int rank;
  int index;  // of the adapter among those of the tile
  int adapters;
  int part;   // of the adapter's outputs
  int block;  // of the cluster

  // The place in the tile of the k-th row, and its place among all.
  __device__ __forceinline__ int place(int k) const { return static_cast<int>(rows >> (4 * k) & 15u); }
  __device__ __forceinline__ int64_t row(int k) const { return tile * kTileRows + place(k); }
};

// The same in every block of the cluster. A rank of 0 says that there is nothing to do.
__device__ __forceinline__ Task find_task(const Launched& l) {
  const LoraDeltaArgs& a = l.args.delta;
  const int lane = threadIdx.x % kWarp;
  const unsigned number = blockIdx.x / kBlocks;
  Task task = {};
  task.tile = blockIdx.y;
  task.block = blockIdx.x % kBlocks;
  const int64_t t = task.tile * kTileRows + lane;
  int32_t slot = lane < kTileRows && t < a.rows ? a.slots[t] : -1;
  const int32_t early = lane < a.adapters ? a.ranks[lane] : 0;
  const bool there = slot >= 0 && slot < a.adapters;
  if (!there) slot = -1;
  const unsigned same = __match_any_sync(kAllLanes, static_cast<uint32_t>(slot));
  unsigned leaders = __ballot_sync(kAllLanes, there && lowest(same) == lane);
  const unsigned adapters = static_cast<unsigned>(__popc(leaders));
  if (adapters == 0) return task;
  const unsigned index = number % adapters;
#pragma unroll 1  // here and below: code that is run once comes from far away
  for (unsigned i = 0; i < index; ++i) leaders &= leaders - 1;
  const int leader = lowest(leaders);
  task.part = static_cast<int>(number / adapters);
  task.index = static_cast<int>(index);
  task.adapters = static_cast<int>(adapters);
  slot = __shfl_sync(kAllLanes, slot, leader);
  task.adapter = slot;
  unsigned mine = __shfl_sync(kAllLanes, same, leader);
  task.count = __popc(mine);
#pragma unroll 1
  for (int k = 0; k < task.count; ++k, mine &= mine - 1) task.rows |= static_cast<uint32_t>(lowest(mine)) << (4 * k);
  const int32_t known = __shfl_sync(kAllLanes, early, slot % kEarly);
  task.rank = max(0, min(slot < kEarly ? known : a.ranks[slot], static_cast<int32_t>(a.rank)));
  return task;
}

template <Dtype D>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  D == Dtype::bf16 ? mma_bf16(d, a, b) : mma_f16(d, a, b);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// Where the sums of A x go that this block has of row k: to every block of the cluster, or to memory.
template <class S>
struct Delivery {
  const Launched& l;
  const Task& task;
  float* received;  // [kBlocks, kTileRows, S::kRow]
  uint64_t* box;    // that of `received`

  // [tiles, kBlocks, kTileRows, rank]
  __device__ __forceinline__ float* inner(int block, int k, int rank) const {
    const int64_t row = (task.tile * kBlocks + block) * kTileRows + task.place(k);
    return l.args.inner + row * l.args.delta.rank + rank;
  }

  // Before the first number is put.
  __device__ __forceinline__ void meet() const {
    if (l.part == Part::whole) cluster_wait();
  }

  __device__ __forceinline__ void put(int k, int rank, float sum) const {
    if (l.part == Part::shrink) {
      *inner(task.block, k, rank) = sum;
      return;
    }
    float* at = received + task.block * S::kSums + k * S::kRow + rank;
#pragma unroll
    for (unsigned to = 0; to < kBlocks; ++to) mailbox_send(at, box, to, sum);
  }

  // Either memory by the same instructions: code that is there twice takes longer to come than they take.
  __device__ __forceinline__ float total(int k, int rank) const {
    const bool expands = l.part == Part::expand;
    const float* from = expands ? inner(0, k, rank) : received + k * S::kRow + rank;
    const int64_t next = expands ? kTileRows * l.args.delta.rank : S::kSums;
    float parts[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) parts[i] = from[i * next];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) sum += parts[i];
    return sum;
  }
};

// A block's part of A x on tensor cores: every 8th of the steps of 64 columns is the block's, and of those every 8th
// the warp's.
template <Dtype D, int Ranks, class S>
struct TensorProjection {
  static constexpr int kRankTiles = Ranks / 16;
  static constexpr int kChains = kRankTiles == 1 ? 2 : 1;  // of sums, so that no instruction waits for the one before

  const LoraDeltaArgs& args;
  const Task& task;
  const int lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  int64_t step;
  const char* a_row;
  const char* x_row;
  uint4 a[kRankTiles][2][2];  // of ranks g and g + 8: columns c and c + 4 of 8 chunks
  uint4 x[2];
  float sums[kChains][kRankTiles][4] = {};

  __device__ __forceinline__ TensorProjection(const LoraDeltaArgs& args, const Task& task)
      : args(args), task(task), step(task.block + kBlocks * (threadIdx.x / kWarp)) {
    a_row = static_cast<const char*>(args.a) + (task.adapter * args.a_stride_m + g * args.a_stride_r + 8 * c) * 2;
    x_row = static_cast<const char*>(args.x) + (task.row(min(g, task.count - 1)) * args.x_stride + 8 * c) * 2;
  }

  // Asks for the numbers of a step. Columns, ranks and rows that there are not are zeros.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = step * kStepColumns + 32 * half;
      const bool inside = column + 8 * c < args.features;
      x[half] = {0, 0, 0, 0};
      if (inside && g < task.count) x[half] = load16_read_only(x_row + column * 2);
#pragma unroll
      for (int i = 0; i < 2 * kRankTiles; ++i) {
        uint4& chunk = a[i / 2][i % 2][half];
        chunk = {0, 0, 0, 0};
        if (inside && g + 8 * i < task.rank) {
          chunk = load16_read_only(a_row + (8 * i * args.a_stride_r + column) * 2);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t low[2] = {x[half].x, x[half].y}, high[2] = {x[half].z, x[half].w};
#pragma unroll
      for (int i = 0; i < kRankTiles; ++i) {
        float (&to)[4] = sums[half % kChains][i];
        const uint4 &upper = a[i][0][half], &lower = a[i][1][half];
        mma<D>(to, {upper.x, lower.x, upper.y, lower.y}, low);
        mma<D>(to, {upper.z, lower.z, upper.w, lower.w}, high);
      }
    }
  }

  // partial: [kWarps, kTileRows, S::kRow]
  __device__ __forceinline__ void finish(float* partial, const Delivery<S>& to) {
    const int64_t steps = (args.features + kStepColumns - 1) / kStepColumns;
#pragma unroll 1
    while (true) {
      multiply();
      step += kBlocks * kWarps;
      if (step >= steps) break;
      begin();
    }
    float* own = partial + threadIdx.x / kWarp * S::kSums;
#pragma unroll
    for (int i = 0; i < kRankTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float sum = sums[0][i][j];
        if constexpr (kChains == 2) sum += sums[1][i][j];
        own[(2 * c + j % 2) * S::kRow + 16 * i + g + j / 2 * 8] = sum;
      }
    }
    __syncthreads();
    to.meet();
#pragma unroll 1
    for (int i = threadIdx.x; i < task.count * Ranks; i += kThreads) {
      const int k = i / Ranks, rank = i % Ranks;
      if (rank >= task.rank) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w * S::kSums + k * S::kRow + rank];
      to.put(k, rank, sum);
    }
  }
};

// The same without tensor cores: a warp takes two ranks at a time, of every 8th 32 N columns.
template <Dtype D, int N, class S>
struct PlainProjection {
  static constexpr int kPair = 2;

  const LoraDeltaArgs& args;
  const Task& task;

  __device__ __forceinline__ PlainProjection(const LoraDeltaArgs& args, const Task& task) : args(args), task(task) {}

  __device__ __forceinline__ void begin() {}

  __device__ __forceinline__ void finish(float*, const Delivery<S>& to) {
    const int lane = threadIdx.x % kWarp;
    int64_t x_row[kTileRows];
#pragma unroll
    for (int k = 0; k < kTileRows; ++k) x_row[k] = task.row(min(k, task.count - 1)) * args.x_stride;
    to.meet();
    for (int rank = kPair * (threadIdx.x / kWarp); rank < task.rank; rank += kPair * kWarps) {
      float sums[kPair][kTileRows] = {};
      for (int64_t column = (int64_t{task.block} * kWarp + lane) * N; column < args.features;
           column += kBlocks * kWarp * N) {
        Elements<D, N> a[kPair];
#pragma unroll
        for (int i = 0; i < kPair; ++i) {
          const int64_t at = task.adapter * args.a_stride_m + (rank + i) * args.a_stride_r + column;
          a[i] = load_if<D, N>(rank + i < task.rank, args.a, at);
        }
#pragma unroll
        for (int k = 0; k < kTileRows; ++k) {
          if (k >= task.count) break;
          const Elements<D, N> x = load<D, N>(args.x, x_row[k] + column);
#pragma unroll
          for (int i = 0; i < kPair; ++i) {
#pragma unroll
            for (int n = 0; n < N; ++n) sums[i][k] = fmaf(a[i][n], x[n], sums[i][k]);
          }
        }
      }
      float own = 0.0f;
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
#pragma unroll
        for (int k = 0; k < kTileRows; ++k) {
          const float sum = warp_sum(sums[i][k]);
          if (lane == i * kTileRows + k) own = sum;
        }
      }
      const int k = lane % kTileRows, of = rank + lane / kTileRows;
      if (lane < kPair * kTileRows && k < task.count && of < task.rank) to.put(k, of, own);
    }
  }
};

// The tiles of outputs that a block has, and who of it takes which: with 8 or more a warp takes whole ones, with fewer
// several warps take the rows of one by turns.
struct Share {
  int tile;  // the first; then every `step`
  int step;
  int tiles;  // of all blocks
  int row;    // likewise
  int row_step;
};

__device__ __forceinline__ Share share_of(const Launched& l, const Task& task, int tiles) {
  const int warp = threadIdx.x / kWarp;
  const int parts = (static_cast<int>(l.clusters) - task.index + task.adapters - 1) / task.adapters;
  const int blocks = parts * kBlocks, block = task.part * kBlocks + task.block;
  const int own = block < tiles ? (tiles - block + blocks - 1) / blocks : 0;
  Share share = {tiles, blocks * kWarps, tiles, 0, 1};
  if (own >= kWarps) {
    share.tile = block + warp * blocks;
  } else if (own > 0) {
    share.row_step = kWarps / own;
    share.row = warp / own;
    if (share.row < share.row_step) share.tile = block + warp % own * blocks;
  }
  return share;
}

// The numbers of `out` that a lane changes in a group of rows of a tile.
template <Dtype D>
struct Old {
  Elements<D, 1> numbers[kGroup];
};

// Adds the sums over 8 ranks' lanes up. Of N outputs a lane has those of output lane * N / 8 in the end.
template <int N>
__device__ __forceinline__ float add_rank_lanes(const float (&sums)[N], int lane) {
  float left[N];
#pragma unroll
  for (int i = 0; i < N; ++i) left[i] = sums[i];
  int bit = kWarp / 2;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? left[i] : left[i + half];
      const float kept = upper ? left[i + half] : left[i];
      left[i] = kept + __shfl_xor_sync(kAllLanes, sent, bit);
    }
  }
#pragma unroll
  for (; bit >= kOutputLanes; bit /= 2) left[0] += __shfl_xor_sync(kAllLanes, left[0], bit);
  return left[0];
}

template <Dtype D, class S, bool Wide>
struct Expansion {
  const LoraDeltaArgs& a;
  const Task& task;
  const Share& share;
  const float* sums;  // [kTileRows, S::kRow]
  unsigned char* ring;

  // The output of a tile that this lane stores; the number of outputs if none.
  __device__ __forceinline__ int64_t output(int tile) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (!Wide) return min(int64_t{tile} * S::kTileOutputs + lane, a.outputs);
    const int rank_lane = lane / kOutputLanes;
    constexpr int kSame = kRankLanes / S::kLaneOutputs;  // lanes that have the same sum
    if (rank_lane % kSame != 0) return a.outputs;
    const int64_t first = int64_t{tile} * S::kTileOutputs + lane % kOutputLanes * S::kLaneOutputs;
    return min(first + rank_lane / kSame, a.outputs);
  }

  __device__ __forceinline__ int64_t place(int tile, int k) const { return task.row(k) * a.out_stride + output(tile); }

  // Rows k, k + row_step, ... of a tile.
  __device__ __forceinline__ Old<D> load_old(int tile, int k) const {
    Old<D> old;
#pragma unroll
    for (int i = 0; i < kGroup; ++i, k += share.row_step) {
      const bool there = tile < share.tiles && k < task.count && output(tile) < a.outputs;
      old.numbers[i] = {};
      if (there) old.numbers[i] = load<D, 1, Memory::written>(a.out, place(tile, k));
    }
    return old;
  }

  // Starts the copies of a tile's numbers of B. What there is not becomes zeros.
  __device__ __forceinline__ void copy_tile(int tile, int stage) const {
    const int lane = threadIdx.x % kWarp;
    if (tile >= share.tiles) return;
    const int64_t o = int64_t{tile} * S::kTileOutputs + lane % kOutputLanes * S::kLaneOutputs;
    const char* from = static_cast<const char*>(a.b) + (task.adapter * a.b_stride_m + o) * kBytes<D>;
    unsigned char* to = ring + stage * S::kStageBytes + lane * 16;
#pragma unroll
    for (int j = 0; j < S::kRankSteps; ++j) {
      const int rank = lane / kOutputLanes + kRankLanes * j;
      if (rank < task.rank && o < a.outputs) {
        copy16_async(to + j * kWarp * 16, from + rank * a.b_stride_r * kBytes<D>);
      } else {
        store16(to + j * kWarp * 16, {0, 0, 0, 0});
      }
    }
  }

  // Group rows from k on by B's tile, as far as this lane stores them.
  template <int Group>
  __device__ __forceinline__ void multiply(int tile, int stage, int k, float (&delta)[kGroup]) const {
    const int lane = threadIdx.x % kWarp;
    const float* of[Group];
#pragma unroll
    for (int i = 0; i < Group; ++i) of[i] = sums + min(k + i * share.row_step, task.count - 1) * S::kRow;
    if constexpr (Wide) {
      float products[Group][S::kLaneOutputs] = {};
      const unsigned char* from = ring + stage * S::kStageBytes + lane * 16;
#pragma unroll 2
      for (int j = 0; j < S::kRankSteps; ++j) {
        if (kRankLanes * j >= task.rank) break;
        const uint4 words = load16(from + j * kWarp * 16);
        const Elements<D, S::kLaneOutputs> b = {{words.x, words.y, words.z, words.w}};
        const int rank = lane / kOutputLanes + kRankLanes * j;
#pragma unroll
        for (int i = 0; i < Group; ++i) {
#pragma unroll
          for (int n = 0; n < S::kLaneOutputs; ++n) products[i][n] = fmaf(b[n], of[i][rank], products[i][n]);
        }
      }
#pragma unroll
      for (int i = 0; i < Group; ++i) delta[i] = add_rank_lanes(products[i], lane);
    } else {
#pragma unroll
      for (int i = 0; i < Group; ++i) delta[i] = 0.0f;
      const int64_t o = output(tile);
      if (o >= a.outputs) return;
#pragma unroll 4
      for (int rank = 0; rank < task.rank; ++rank) {
        const int64_t at = task.adapter * a.b_stride_m + o * a.b_stride_o + rank * a.b_stride_r;
        const float b = load<D, 1>(a.b, at)[0];
#pragma unroll
        for (int i = 0; i < Group; ++i) delta[i] = fmaf(b, of[i][rank], delta[i]);
      }
    }
  }

  // The whole share, from the first numbers of `out` on.
  __device__ __forceinline__ void run(Old<D> next, float scale) const {
    int stage = 0;
#pragma unroll 1
    for (int tile = share.tile; tile < share.tiles; tile += share.step) {
      if constexpr (Wide) copies_wait<S::kStages - 1>();
#pragma unroll 1
      for (int k = share.row; k < task.count;) {
        const Old<D> old = next;
        const int group = k;
        k += kGroup * share.row_step;
        next = k < task.count ? load_old(tile, k) : load_old(tile + share.step, share.row);
        float delta[kGroup];
        if (group + share.row_step >= task.count) {
          multiply<1>(tile, stage, group, delta);
        } else {
          multiply<kGroup>(tile, stage, group, delta);
        }
        const int64_t o = output(tile);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const int of = group + i * share.row_step;
          if (of >= task.count || o >= a.outputs) continue;
          Elements<D, 1> rounded;
          rounded.set({fmaf(scale, delta[i], old.numbers[i][0])});
          store(a.out, place(tile, of), rounded);
        }
      }
      if constexpr (Wide) {
        copy_tile(tile + S::kStages * share.step, stage);
        copies_commit();
        stage = stage + 1 == S::kStages ? 0 : stage + 1;
      }
    }
  }
};

// Ranks is 16 or 64. Wide: all rows are whole multiples of 16 bytes, and B's outputs are neighbours.
template <Dtype D, int Ranks, bool Wide>
__global__ void __launch_bounds__(kThreads, 2) lora_delta_kernel(const __grid_constant__ Launched l) {
  using S = Shape<D, Ranks, Wide>;
  PERSONAFAST_DYNAMIC_SHARED(shared);
  const LoraDeltaArgs& a = l.args.delta;
  const int warp = threadIdx.x / kWarp;
  float* const partial = reinterpret_cast<float*>(shared + S::kRingBytes);  // [kWarps, kTileRows, S::kRow]
  float* const received = partial + kWarps * S::kSums;                      // [kBlocks, kTileRows, S::kRow]
  float* const sums = partial;  // [kTileRows, S::kRow], when all is received, which includes what was in `partial`
  uint64_t* const box = reinterpret_cast<uint64_t*>(received + kBlocks * S::kSums);

  const Task task = find_task(l);
  const int tiles = static_cast<int>((a.outputs + S::kTileOutputs - 1) / S::kTileOutputs);
  if (task.rank == 0 || task.part * kBlocks >= (l.part == Part::shrink ? 1 : tiles)) return;
  using Projection = std::conditional_t<Wide && D != Dtype::f32, TensorProjection<D, Ranks, S>,
                                        PlainProjection<D, Wide ? kWide<D> : 1, S>>;
  Projection projection(a, task);
  if (l.part != Part::expand) projection.begin();

  if (l.part == Part::whole) {
    const uint32_t numbers = static_cast<uint32_t>(kBlocks * task.count * task.rank);
    if (threadIdx.x == 0) mailbox_open(box, numbers * sizeof(float));
    // Whether all blocks of the cluster run is known long before it has to be.
    cluster_arrive();
  }
  const Share share = share_of(l, task, tiles);
  const Expansion<D, S, Wide> expansion = {a, task, share, sums, shared + warp * S::kStages * S::kStageBytes};
  Old<D> old = {};
  float scale = 0.0f;
  if (l.part != Part::shrink) {
    scale = a.scale[task.adapter];
    if constexpr (Wide) {
#pragma unroll 1
      for (int stage = 0; stage < S::kStages; ++stage) {
        expansion.copy_tile(share.tile + stage * share.step, stage);
        copies_commit();
      }
    }
    old = expansion.load_old(share.tile, share.row);
  }

  const Delivery<S> delivery = {l, task, received, box};
  if (l.part != Part::expand) projection.finish(partial, delivery);
  if (l.part == Part::shrink) return;
  if (l.part == Part::whole) mailbox_wait(box);
#pragma unroll 1
  for (int i = threadIdx.x; i < task.count * Ranks; i += kThreads) {
    const int k = i / Ranks, rank = i % Ranks;
    sums[k * S::kRow + rank] = rank < task.rank ? delivery.total(k, rank) : 0.0f;
  }
  __syncthreads();
  expansion.run(old, scale);
  if constexpr (Wide) copies_wait<0>();
}

template <Dtype D, int Ranks, bool Wide>
int run(const LoraDeltaCudaArgs& args, void* stream) {
  using S = Shape<D, Ranks, Wide>;
  const LoraDeltaArgs& a = args.delta;
  const int64_t row_tiles = (a.rows + kTileRows - 1) / kTileRows;
  int64_t adapters = a.rows < kTileRows ? a.rows : kTileRows;
  if (a.adapters < adapters) adapters = a.adapters;
  // A tile of outputs a warp, until every multiprocessor has two blocks; but there may be an adapter for every row.
  const int64_t tiles = (a.outputs + S::kTileOutputs - 1) / S::kTileOutputs;
  const int64_t most = 2 * multiprocessors() / (kBlocks * row_tiles);
  int64_t clusters = (adapters * tiles + kBlocks * kWarps - 1) / (kBlocks * kWarps);
  if (clusters > most) clusters = most;
  if (clusters < adapters) clusters = adapters;
  const auto start = [&](Part part, int64_t of_a_tile, unsigned cluster) {
    const dim3 grid(static_cast<unsigned>(of_a_tile * kBlocks), static_cast<unsigned>(row_tiles));
    const Launched launched = {args, part, static_cast<unsigned>(of_a_tile)};
    return launch_clusters(lora_delta_kernel<D, Ranks, Wide>, grid, cluster, dim3(kThreads), S::kSharedBytes, stream,
                           launched);
  };
  if (args.inner == nullptr) return start(Part::whole, clusters, kBlocks);
  const int error = start(Part::shrink, adapters, 1);
  return error != 0 ? error : start(Part::expand, clusters, 1);
}

template <Dtype D>
int run(const LoraDeltaCudaArgs& args, void* stream) {
  const LoraDeltaArgs& a = args.delta;
  const bool wide = rows_are_wide(a.x, a.x_stride, a.features, D) && rows_are_wide(a.a, a.a_stride_r, a.features, D) &&
                    rows_are_wide(a.a, a.a_stride_m, a.features, D) && a.b_stride_o == 1 &&
                    rows_are_wide(a.b, a.b_stride_r, a.outputs, D) && rows_are_wide(a.b, a.b_stride_m, a.outputs, D);
  if (!wide) return run<D, kLoraDeltaCudaRank, false>(args, stream);
  return a.rank <= 16 ? run<D, 16, true>(args, stream) : run<D, kLoraDeltaCudaRank, true>(args, stream);
}

}  // namespace

int lora_delta_cuda(const LoraDeltaCudaArgs& args, void* stream) {
  const LoraDeltaArgs& a = args.delta;
  if (a.rows == 0 || a.outputs == 0 || a.features == 0 || a.adapters == 0 || a.rank == 0) return 0;
  if (a.rank > kLoraDeltaCudaRank) return kInvalidValue;
  switch (a.dtype) {
    case Dtype::f32:
      return run<Dtype::f32>(args, stream);
    case Dtype::bf16:
      return run<Dtype::bf16>(args, stream);
    case Dtype::f16:
      return run<Dtype::f16>(args, stream);
  }
  return 0;
}

}  // namespace personafast
