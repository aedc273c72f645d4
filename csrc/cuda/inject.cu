// inject on a GPU: hidden[t] += scale[t] * bank[slots[t]], 2 T H elements of traffic, since the bank comes from cache.
//
// A block takes a part of one row. The slot says where the bank is read, so that two waits are in sequence. Where all
// blocks run at once, as in decoding, the launch and these waits are what it costs: a thread has 16 bytes, and asks for
// hidden before its slot has come, though a row of slot -1 is then read for nothing. Where there are several waves,
// other blocks' loads fill the wait: a thread has 64 bytes, and a row that is left alone is not read.

#include "personafast/inject.h"

#include "rows.cuh"

namespace personafast {
namespace {

using namespace cuda;

constexpr int kThreads = 128;

// Chunks of N columns a thread; neighbouring threads have neighbouring chunks.
template <Dtype H, Dtype B, int N, int Chunks, bool Eager>
__global__ void __launch_bounds__(kThreads) inject_kernel(const __grid_constant__ InjectArgs a) {
  const int64_t t = blockIdx.x;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * Chunks * step + static_cast<int64_t>(threadIdx.x) * N;
  char* row = static_cast<char*>(a.hidden) + t * a.hidden_stride * kBytes<H>;
  Elements<H, N> hidden[Chunks];
  if constexpr (Eager) {
#pragma unroll
    for (int k = 0; k < Chunks; ++k) {
      if (first + k * step < a.width) hidden[k] = load<H, N, Memory::written>(row, first + k * step);
    }
    __syncwarp();  // or the compiler may put these loads behind the wait for the slot
  }
  const int64_t slot = a.slots[t];
  const float scale = a.scale ? a.scale[t] : 1.0f;
  const bool steered = slot >= 0 && slot < a.bank_rows;
  if constexpr (!Eager) {
    if (!steered) return;
  }
  const int64_t end = steered ? a.width : 0;
  const char* bank = static_cast<const char*>(a.bank) + (steered ? slot : 0) * a.bank_stride * kBytes<B>;
  Elements<B, N> added[Chunks];
#pragma unroll
  for (int k = 0; k < Chunks; ++k) {
    if (first + k * step >= end) continue;
    if constexpr (!Eager) hidden[k] = load<H, N, Memory::written>(row, first + k * step);
    added[k] = load<B, N>(bank, first + k * step);
  }
#pragma unroll
  for (int k = 0; k < Chunks; ++k) {
    if (first + k * step >= end) continue;
    float sums[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = hidden[k][i] + added[k][i] * scale;
    hidden[k].set(sums);
    store(row, first + k * step, hidden[k]);
  }
}

template <Dtype H, Dtype B, int N>
int run(const InjectArgs& a, void* stream) {
  const int64_t chunks = (a.width + N - 1) / N;
  const int64_t threads = chunks < kThreads ? (chunks + kWarp - 1) / kWarp * kWarp : kThreads;
  const int64_t parts = (chunks + threads - 1) / threads;
  if (in_one_wave(a.rows * parts * threads)) {
    const dim3 grid(static_cast<unsigned>(a.rows), static_cast<unsigned>(parts));
    return launch(inject_kernel<H, B, N, 1, true>, grid, dim3(static_cast<unsigned>(threads)), 0, stream, a);
  }
  const dim3 grid(static_cast<unsigned>(a.rows), static_cast<unsigned>((parts + 3) / 4));
  return launch(inject_kernel<H, B, N, 4, false>, grid, dim3(static_cast<unsigned>(threads)), 0, stream, a);
}

template <Dtype H, Dtype B>
int run(const InjectArgs& a, void* stream) {
  const bool wide =
      rows_are_wide(a.hidden, a.hidden_stride, a.width, H) && rows_are_wide(a.bank, a.bank_stride, a.width, B);
  return wide ? run<H, B, kWide<H>>(a, stream) : run<H, B, 1>(a, stream);
}

}  // namespace

int inject_cuda(const InjectArgs& a, void* stream) {
  if (a.rows == 0 || a.width == 0 || a.bank_rows == 0) return 0;
  const bool wide_bank = a.bank_dtype == Dtype::f32;
  switch (a.hidden_dtype) {
    case Dtype::f32:
      return run<Dtype::f32, Dtype::f32>(a, stream);
    case Dtype::bf16:
      return wide_bank ? run<Dtype::bf16, Dtype::f32>(a, stream) : run<Dtype::bf16, Dtype::bf16>(a, stream);
    case Dtype::f16:
      return wide_bank ? run<Dtype::f16, Dtype::f32>(a, stream) : run<Dtype::f16, Dtype::f16>(a, stream);
  }
  return 0;
}

}  // namespace personafast
