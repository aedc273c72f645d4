// lora_delta in plain C++: 16 partial sums for each dot product with A, tiles of 64 outputs for B. Its outputs take any
// strides of B, and so serve the other instruction sets too where the outputs of B are not adjacent.

#include "kernels.h"
#include "scalar_float.h"

namespace personafast::scalar {
namespace {

template <Dtype D>
void inner(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  for (int64_t r = begin; r < end; ++r) {
    const void* down = static_cast<const char*>(a.a) + (g.adapter * a.a_stride_m + r * a.a_stride_r) * kBytes;
    for (int64_t k = 0; k < g.count; ++k) {
      const void* x = static_cast<const char*>(a.x) + g.rows[k] * a.x_stride * kBytes;
      float sums[16] = {};
      int64_t i = 0;
      for (; i + 16 <= a.features; i += 16) {
        for (int j = 0; j < 16; ++j) sums[j] += load<D>(down, i + j) * load<D>(x, i + j);
      }
      for (int j = 0; i + j < a.features; ++j) sums[j] += load<D>(down, i + j) * load<D>(x, i + j);
      for (int width = 8; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
      }
      g.inner[k * g.rank + r] = a.scale[g.adapter] * sums[0];
    }
  }
}

// Stride is that of the outputs of B: the constant 1 lets the compiler vectorise.
template <Dtype D, class Stride>
void outputs(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end, Stride stride) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  constexpr int64_t kTile = 64;
  const char* up = static_cast<const char*>(a.b) + g.adapter * a.b_stride_m * kBytes;
  for (int64_t o = begin; o < end; o += kTile) {
    const int64_t n = end - o < kTile ? end - o : kTile;
    for (int64_t k = 0; k < g.count; ++k) {
      float sums[kTile] = {};
      for (int64_t r = 0; r < g.rank; ++r) {
        const float factor = g.inner[k * g.rank + r];
        const void* from = up + (r * a.b_stride_r + o * stride()) * kBytes;
        for (int64_t j = 0; j < n; ++j) sums[j] += factor * load<D>(from, j * stride());
      }
      char* out = static_cast<char*>(a.out) + g.rows[k] * a.out_stride * kBytes;
      for (int64_t j = 0; j < n; ++j) store<D>(out, o + j, load<D>(out, o + j) + sums[j]);
    }
  }
}

template <Dtype D>
void outputs(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  if (a.b_stride_o == 1) return outputs<D>(a, g, begin, end, [] { return static_cast<int64_t>(1); });
  outputs<D>(a, g, begin, end, [&] { return a.b_stride_o; });
}

}  // namespace

void lora_delta_inner(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return inner<Dtype::f32>(a, g, begin, end);
    case Dtype::bf16:
      return inner<Dtype::bf16>(a, g, begin, end);
    case Dtype::f16:
      return inner<Dtype::f16>(a, g, begin, end);
  }
}

void lora_delta_outputs(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return outputs<Dtype::f32>(a, g, begin, end);
    case Dtype::bf16:
      return outputs<Dtype::bf16>(a, g, begin, end);
    case Dtype::f16:
      return outputs<Dtype::f16>(a, g, begin, end);
  }
}

}  // namespace personafast::scalar
