// lora_delta: dot products with the rows of A (dpbf16 for bf16), then multiply-adds of the rows of B on tiles of
// outputs that stay in registers. The products with A stay in fp32 between the two.

#include <immintrin.h>

#include "kernels.h"

namespace personafast::avx512 {
namespace {

// Batch rows that share a load of A or B.
constexpr int kRows = 4;

// Chains of partial sums of a dot product, which hide the latency of the multiply-add. Which columns go to which
// depends on their position alone, so that a row's sum does not depend on how many rows are taken together.
constexpr int kChains = 4;

template <Dtype D>
__m512 load(const void* base, int64_t i, __mmask16 m) {
  if constexpr (D == Dtype::f32) {
    return _mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + i);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + i);
    if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// Round to nearest even in integers: cvtneps_pbh would flush denormals.
__m256i to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

template <Dtype D>
void store(void* base, int64_t i, __mmask16 m, __m512 value) {
  if constexpr (D == Dtype::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(base) + i, m, value);
  } else {
    const __m256i half = D == Dtype::f16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bf16(value);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(base) + i, m, half);
  }
}

template <Dtype D, int T>
struct Dots {
  // Columns of one step of one chain.
  static constexpr int64_t kStep = D == Dtype::bf16 ? 32 : 16;

  __m512 sums[T][kChains];

  // Columns i to i + kStep - 1, of which the first `left` exist.
  template <int Chain>
  void step(const void* down, const void* const* x, int64_t i, int64_t left) {
    const __mmask32 exist = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
    if constexpr (D == Dtype::bf16) {
      const __m512bh d = (__m512bh)_mm512_maskz_loadu_epi16(exist, static_cast<const uint16_t*>(down) + i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512bh xt = (__m512bh)_mm512_maskz_loadu_epi16(exist, static_cast<const uint16_t*>(x[t]) + i);
        sums[t][Chain] = _mm512_dpbf16_ps(sums[t][Chain], d, xt);
      }
    } else {
      const __mmask16 m = static_cast<__mmask16>(exist);
      const __m512 d = load<D>(down, i, m);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[t][Chain] = _mm512_fmadd_ps(d, load<D>(x[t], i, m), sums[t][Chain]);
    }
  }
};

template <Dtype D, int T>
void dots(const LoraDeltaArgs& a, const LoraGroup& g, int64_t r, int64_t k) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  constexpr int64_t kStep = Dots<D, T>::kStep;
  const void* down = static_cast<const char*>(a.a) + (g.adapter * a.a_stride_m + r * a.a_stride_r) * kBytes;
  const void* x[T];
  for (int t = 0; t < T; ++t) x[t] = static_cast<const char*>(a.x) + g.rows[k + t] * a.x_stride * kBytes;
  Dots<D, T> dot = {};
  int64_t i = 0;
  for (; i + kChains * kStep <= a.features; i += kChains * kStep) {
    dot.template step<0>(down, x, i, 32);
    dot.template step<1>(down, x, i + kStep, 32);
    dot.template step<2>(down, x, i + 2 * kStep, 32);
    dot.template step<3>(down, x, i + 3 * kStep, 32);
  }
  const int64_t left = a.features - i;
  if (left > 0) dot.template step<0>(down, x, i, left);
  if (left > kStep) dot.template step<1>(down, x, i + kStep, left - kStep);
  if (left > 2 * kStep) dot.template step<2>(down, x, i + 2 * kStep, left - 2 * kStep);
  if (left > 3 * kStep) dot.template step<3>(down, x, i + 3 * kStep, left - 3 * kStep);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m512 sum =
        _mm512_add_ps(_mm512_add_ps(dot.sums[t][0], dot.sums[t][1]), _mm512_add_ps(dot.sums[t][2], dot.sums[t][3]));
    g.inner[(k + t) * g.rank + r] = a.scale[g.adapter] * _mm512_reduce_add_ps(sum);
  }
}

template <Dtype D>
void inner(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    int64_t k = 0;
    for (; k + kRows <= g.count; k += kRows) dots<D, kRows>(a, g, r, k);
    for (; k < g.count; ++k) dots<D, 1>(a, g, r, k);
  }
}

// T rows, V vectors of 16 outputs each from o on; m says which of the last vector exist.
template <Dtype D, int T, int V>
void tile(const LoraDeltaArgs& a, const LoraGroup& g, int64_t k, int64_t o, __mmask16 m) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const char* up = static_cast<const char*>(a.b) + g.adapter * a.b_stride_m * kBytes;
  const float* factors = g.inner + k * g.rank;
  __m512 sums[T][V] = {};
  for (int64_t r = 0; r < g.rank; ++r) {
    const void* from = up + r * a.b_stride_r * kBytes;
    __m512 factor[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) factor[t] = _mm512_set1_ps(factors[t * g.rank + r]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const __m512 b = load<D>(from, o + 16 * v, v + 1 < V ? static_cast<__mmask16>(0xffff) : m);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sums[t][v] = _mm512_fmadd_ps(factor[t], b, sums[t][v]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    char* out = static_cast<char*>(a.out) + g.rows[k + t] * a.out_stride * kBytes;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const __mmask16 exist = v + 1 < V ? static_cast<__mmask16>(0xffff) : m;
      store<D>(out, o + 16 * v, exist, _mm512_add_ps(load<D>(out, o + 16 * v, exist), sums[t][v]));
    }
  }
}

template <Dtype D, int T>
void columns(const LoraDeltaArgs& a, const LoraGroup& g, int64_t k, int64_t begin, int64_t end) {
  constexpr int V = 16 / T;
  int64_t o = begin;
  for (; o + 16 * V <= end; o += 16 * V) tile<D, T, V>(a, g, k, o, 0xffff);
  for (; o < end; o += 16) {
    const int64_t left = end - o;
    tile<D, T, 1>(a, g, k, o, left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1));
  }
}

template <Dtype D>
void outputs(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  // As many outputs as one row's tile has: what they need of B stays in L1 for all rows of the group.
  constexpr int64_t kColumns = 256;
  for (int64_t o = begin; o < end; o += kColumns) {
    const int64_t last = end - o < kColumns ? end : o + kColumns;
    int64_t k = 0;
    for (; k + kRows <= g.count; k += kRows) columns<D, kRows>(a, g, k, o, last);
    for (; k < g.count; ++k) columns<D, 1>(a, g, k, o, last);
  }
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

}  // namespace personafast::avx512
