// steer on a GPU: 2 T H elements of traffic, since the directions come from cache.
//
// Every mode makes of a row h and its direction d the row (keep h + add d) ratio, and the three numbers follow from at
// most two sums over the row: h.d and d.d where the coordinate along d changes, |h|^2 and |h + p d|^2 where the norm is
// kept. One pass has the two of any mode, so that rows of all modes run the same instructions.
//
// A block takes a row, which stays in registers between the sums and the result; a row that is too wide for that is
// read twice, the second time from L1 or L2. A row for which there is nothing to do is not written.

#include "personafast/steer.h"

#include "rows.cuh"

namespace personafast {
namespace {

using namespace cuda;

struct Slot {
  bool known;     // whether there is such a slot
  int64_t index;  // 0 if not
  SteerMode mode;
  float p0;
  float p1;
  float scale;
};

struct Update {
  float keep;
  float add;
  float ratio;
  bool changes;
};

__device__ __forceinline__ Slot slot_of(const SteerArgs& a, int64_t t) {
  const int64_t slot = a.slots[t];
  const bool known = slot >= 0 && slot < a.directions_rows;
  Slot s = {known, known ? slot : 0, SteerMode::ablate, 0.0f, 0.0f, a.scale ? a.scale[t] : 1.0f};
  if (known) {
    s.mode = static_cast<SteerMode>(a.mode[s.index]);
    s.p0 = a.params[2 * s.index];
    s.p1 = a.params[2 * s.index + 1];
  }
  return s;
}

// min(max(value, low), high), NaN if any of them is.
__device__ __forceinline__ float clip(float value, float low, float high) {
  const float raised = value >= low ? value : value != value ? value : low;
  return raised > high || high != high ? high : raised;
}

__device__ __forceinline__ Update update_of(const Slot& s, float first, float second) {
  Update u = {1.0f, s.scale * s.p0, 1.0f, s.known};
  const float inverse = rsqrtf(second);
  const float coordinate = first * inverse;
  switch (s.mode) {
    case SteerMode::ablate:
      u.add = -u.add * coordinate * inverse;
      break;
    case SteerMode::clamp:
      u.add = s.scale * (clip(coordinate, s.p0, s.p1) - coordinate) * inverse;
      break;
    case SteerMode::norm_preserving:
      u.ratio = sqrtf(first) * inverse;
      break;
    case SteerMode::replace:
      u.keep = 1.0f - s.scale;
      break;
    default:
      u.changes = false;
  }
  if (s.mode != SteerMode::replace && second == 0.0f) u.changes = false;
  if (u.keep == 1.0f && u.add == 0.0f) u.changes = false;
  return u;
}

// A thread's part of a row: every blockDim.x-th chunk of N columns, of those from `first` on the next kRowChunks.
template <Dtype H, Dtype D, int N>
struct Part {
  Elements<H, N> hidden[kRowChunks];
  Elements<D, N> direction[kRowChunks];

  __device__ __forceinline__ void load_hidden(const void* row, int64_t first, int64_t step, int64_t end) {
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
      hidden[k] = load_if<H, N, Memory::written>(first + k * step < end, row, first + k * step);
    }
  }

  __device__ __forceinline__ void load_direction(const void* row, int64_t first, int64_t step, int64_t end) {
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
      direction[k] = load_if<D, N>(first + k * step < end, row, first + k * step);
    }
  }

  // Adds to the two sums that the mode asks for. Chunks beyond the row are zeros.
  __device__ __forceinline__ void sum(float (&sums)[2], const Slot& s) const {
    const bool preserve = s.mode == SteerMode::norm_preserving;
    const float amount = s.scale * s.p0;
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float h = hidden[k][i], d = direction[k][i];
        const float other = preserve ? fmaf(amount, d, h) : d;
        sums[0] = fmaf(h, preserve ? h : d, sums[0]);
        sums[1] = fmaf(other, other, sums[1]);
      }
    }
  }

  __device__ __forceinline__ void apply(void* row, const Update& u, int64_t first, int64_t step, int64_t end) const {
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
      float moved[N];
#pragma unroll
      for (int i = 0; i < N; ++i) moved[i] = fmaf(u.keep, hidden[k][i], u.add * direction[k][i]) * u.ratio;
      Elements<H, N> rounded;
      rounded.set(moved);
      if (first + k * step < end) store(row, first + k * step, rounded);
    }
  }
};

enum class Reads {
  eager,  // the row stays in registers and is read before its slot has come
  whole,  // it stays in registers
  twice,
};

template <Dtype H, Dtype D, int N, Reads R>
__global__ void __launch_bounds__(kRowThreads, 1) steer_kernel(const __grid_constant__ SteerArgs a) {
  const int64_t t = blockIdx.x;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  char* row = static_cast<char*>(a.hidden) + t * a.hidden_stride * kBytes<H>;
  Part<H, D, N> part;
  if constexpr (R == Reads::eager) {
    part.load_hidden(row, first, step, a.width);
    __syncwarp();  // or the compiler would put these loads behind the wait for the slot
  }
  const Slot s = slot_of(a, t);
  if constexpr (R != Reads::eager) {
    if (!s.known) return;
  }
  const int64_t end = s.known ? a.width : 0;
  const char* direction = static_cast<const char*>(a.directions) + s.index * a.directions_stride * kBytes<D>;
  float sums[2] = {0.0f, 0.0f};
  if constexpr (R != Reads::twice) {
    if constexpr (R == Reads::whole) part.load_hidden(row, first, step, end);
    part.load_direction(direction, first, step, end);
    part.sum(sums, s);
  } else {
    for (int64_t c = first; c < end; c += kRowChunks * step) {
      part.load_hidden(row, c, step, end);
      part.load_direction(direction, c, step, end);
      part.sum(sums, s);
    }
  }
  block_sums(sums);
  const Update u = update_of(s, sums[0], sums[1]);
  if (!u.changes) return;
  if constexpr (R != Reads::twice) {
    part.apply(row, u, first, step, end);
  } else {
    for (int64_t c = first; c < end; c += kRowChunks * step) {
      part.load_hidden(row, c, step, end);
      part.load_direction(direction, c, step, end);
      part.apply(row, u, c, step, end);
    }
  }
}

template <Dtype H, Dtype D, int N>
int run(const SteerArgs& a, void* stream) {
  const int64_t chunks = (a.width + N - 1) / N;
  const int64_t threads = row_threads(chunks);
  const dim3 grid(static_cast<unsigned>(a.rows));
  const dim3 block(static_cast<unsigned>(threads));
  if (chunks > threads * kRowChunks) return launch(steer_kernel<H, D, N, Reads::twice>, grid, block, 0, stream, a);
  return in_one_wave(a.rows * threads) ? launch(steer_kernel<H, D, N, Reads::eager>, grid, block, 0, stream, a)
                                       : launch(steer_kernel<H, D, N, Reads::whole>, grid, block, 0, stream, a);
}

template <Dtype H, Dtype D>
int run(const SteerArgs& a, void* stream) {
  const bool wide = rows_are_wide(a.hidden, a.hidden_stride, a.width, H) &&
                    rows_are_wide(a.directions, a.directions_stride, a.width, D);
  return wide ? run<H, D, kWide<H>>(a, stream) : run<H, D, 1>(a, stream);
}

}  // namespace

int steer_cuda(const SteerArgs& a, void* stream) {
  if (a.rows == 0 || a.width == 0 || a.directions_rows == 0) return 0;
  const bool wide = a.directions_dtype == Dtype::f32;
  switch (a.hidden_dtype) {
    case Dtype::f32:
      return run<Dtype::f32, Dtype::f32>(a, stream);
    case Dtype::bf16:
      return wide ? run<Dtype::bf16, Dtype::f32>(a, stream) : run<Dtype::bf16, Dtype::bf16>(a, stream);
    case Dtype::f16:
      return wide ? run<Dtype::f16, Dtype::f32>(a, stream) : run<Dtype::f16, Dtype::f16>(a, stream);
  }
  return 0;
}

}  // namespace personafast
