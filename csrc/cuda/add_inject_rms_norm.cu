// add_inject_rms_norm on a GPU: 4 T H elements, two rows read and two written, where the three steps one after the
// other move 7; bank and weight come from cache.
//
// A block takes a row. Its sum stays in registers until the root is known; of a row that is too wide for that, the
// second pass reads back what the first has written, from L1 or L2. Whether a row is steered is known only when its
// slot has come, which nothing but the load of the bank waits for.

#include "personafast/add_inject_rms_norm.h"

#include "rows.cuh"

namespace personafast {
namespace {

using namespace cuda;

template <Dtype D, Dtype B, Dtype W, int N, bool Whole>
__global__ void __launch_bounds__(kRowThreads, 1)
    add_inject_rms_norm_kernel(const __grid_constant__ AddInjectRmsNormArgs a) {
  const int64_t t = blockIdx.x;
  const int64_t start = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  const char* update = static_cast<const char*>(a.update) + t * a.update_stride * kBytes<D>;
  const char* residual = static_cast<const char*>(a.residual) + t * a.residual_stride * kBytes<D>;
  char* residual_out = static_cast<char*>(a.residual_out) + t * a.width * kBytes<D>;
  char* normed = static_cast<char*>(a.normed) + t * a.width * kBytes<D>;
  Elements<D, N> sums[kRowChunks];
  Elements<W, N> weight[kRowChunks];
  float squares[1] = {0.0f};

  // The first of the thread's chunks; the next ones are `step` columns apart.
  const auto add = [&](int64_t first) {
    Elements<D, N> other[kRowChunks];
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
      const int64_t column = first + k * step;
      sums[k] = load_if<D, N>(column < a.width, update, column);
      other[k] = load_if<D, N>(column < a.width, residual, column);
    }
    const int64_t slot = a.slots[t];
    const float scale = a.scale ? a.scale[t] : 1.0f;
    const bool steered = slot >= 0 && slot < a.bank_rows;
    const char* bank = static_cast<const char*>(a.bank) + (steered ? slot : 0) * a.bank_stride * kBytes<B>;
    Elements<B, N> added[kRowChunks];
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
      const int64_t column = first + k * step;
      added[k] = load_if<B, N>(steered && column < a.width, bank, column);
      if constexpr (Whole) weight[k] = load_if<W, N>(column < a.width, a.weight, column);
    }
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
      float exact[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float sum = sums[k][i] + other[k][i];
        exact[i] = steered ? sum + added[k][i] * scale : sum;
      }
      sums[k].set(exact);
      if (first + k * step < a.width) store(residual_out, first + k * step, sums[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) squares[0] = fmaf(sums[k][i], sums[k][i], squares[0]);
    }
  };

  const auto norm = [&](int64_t first, float inverse) {
    if constexpr (!Whole) {
#pragma unroll
      for (int k = 0; k < kRowChunks; ++k) {
        const int64_t column = first + k * step;
        sums[k] = load_if<D, N, Memory::written>(column < a.width, residual_out, column);
        weight[k] = load_if<W, N>(column < a.width, a.weight, column);
      }
    }
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k) {
      float exact[N];
#pragma unroll
      for (int i = 0; i < N; ++i) exact[i] = sums[k][i] * inverse * weight[k][i];
      Elements<D, N> rounded;
      rounded.set(exact);
      if (first + k * step < a.width) store(normed, first + k * step, rounded);
    }
  };

  if constexpr (Whole) {
    add(start);
  } else {
    for (int64_t first = start; first < a.width; first += kRowChunks * step) add(first);
  }
  block_sums(squares);
  const float inverse = rsqrtf(squares[0] / static_cast<float>(a.width) + a.eps);
  if constexpr (Whole) {
    norm(start, inverse);
  } else {
    for (int64_t first = start; first < a.width; first += kRowChunks * step) norm(first, inverse);
  }
}

template <Dtype D, Dtype B, Dtype W, int N>
int run(const AddInjectRmsNormArgs& a, void* stream) {
  const int64_t chunks = (a.width + N - 1) / N;
  const int64_t threads = row_threads(chunks);
  const dim3 grid(static_cast<unsigned>(a.rows));
  const dim3 block(static_cast<unsigned>(threads));
  return chunks <= threads * kRowChunks
             ? launch(add_inject_rms_norm_kernel<D, B, W, N, true>, grid, block, 0, stream, a)
             : launch(add_inject_rms_norm_kernel<D, B, W, N, false>, grid, block, 0, stream, a);
}

template <Dtype D, Dtype B, Dtype W>
int run(const AddInjectRmsNormArgs& a, void* stream) {
  const bool wide = rows_are_wide(a.update, a.update_stride, a.width, D) &&
                    rows_are_wide(a.residual, a.residual_stride, a.width, D) &&
                    rows_are_wide(a.normed, a.width, a.width, D) &&
                    rows_are_wide(a.residual_out, a.width, a.width, D) &&
                    rows_are_wide(a.bank, a.bank_stride, a.width, B) && rows_are_wide(a.weight, 0, a.width, W);
  return wide ? run<D, B, W, kWide<D>>(a, stream) : run<D, B, W, 1>(a, stream);
}

template <Dtype D>
int run(const AddInjectRmsNormArgs& a, void* stream) {
  const bool wide_bank = a.bank_dtype == Dtype::f32;
  if (a.weight_dtype == Dtype::f32) {
    return wide_bank ? run<D, Dtype::f32, Dtype::f32>(a, stream) : run<D, D, Dtype::f32>(a, stream);
  }
  return wide_bank ? run<D, Dtype::f32, D>(a, stream) : run<D, D, D>(a, stream);
}

}  // namespace

int add_inject_rms_norm_cuda(const AddInjectRmsNormArgs& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return 0;
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
