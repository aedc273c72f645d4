// lora_delta, 8 columns at a time: dot products with the rows of A, then multiply-adds of the rows of B on tiles of
// outputs that stay in registers. The products with A stay in fp32 between the two.

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace personafast::avx2 {
namespace {

// Batch rows that share a load of A or B.
constexpr int kRows = 2;

// Chains of partial sums of a dot product, which hide the latency of the multiply-add. Which columns go to which
// depends on their position alone, so that a row's sum does not depend on how many rows are taken together.
constexpr int kChains = 4;

// Columns i to i + n - 1, zeros after them; n is at most 8 and may be negative.
template <Dtype D>
__m256 load(const void* base, int64_t i, int64_t n) {
  if (n <= 0) return _mm256_setzero_ps();
  if constexpr (D == Dtype::f32) {
    const float* from = static_cast<const float*>(base) + i;
    if (n >= 8) return _mm256_loadu_ps(from);
    float buffer[8] = {};
    memcpy(buffer, from, n * 4);
    return _mm256_loadu_ps(buffer);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(base) + i;
    uint16_t buffer[8] = {};
    if (n < 8) {
      memcpy(buffer, from, n * 2);
      from = buffer;
    }
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (D == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

__m128i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <Dtype D>
void store(void* base, int64_t i, int64_t n, __m256 value) {
  if constexpr (D == Dtype::f32) {
    float* to = static_cast<float*>(base) + i;
    if (n >= 8) return _mm256_storeu_ps(to, value);
    float buffer[8];
    _mm256_storeu_ps(buffer, value);
    memcpy(to, buffer, n * 4);
  } else {
    uint16_t* to = static_cast<uint16_t*>(base) + i;
    const __m128i half = D == Dtype::f16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bf16(value);
    if (n >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
    uint16_t buffer[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), half);
    memcpy(to, buffer, n * 2);
  }
}

float total(const __m256* chain) {
  const __m256 sum = _mm256_add_ps(_mm256_add_ps(chain[0], chain[1]), _mm256_add_ps(chain[2], chain[3]));
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

template <Dtype D, int T>
void dots(const LoraDeltaArgs& a, const LoraGroup& g, int64_t r, int64_t k) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const void* down = static_cast<const char*>(a.a) + (g.adapter * a.a_stride_m + r * a.a_stride_r) * kBytes;
  const void* x[T];
  for (int t = 0; t < T; ++t) x[t] = static_cast<const char*>(a.x) + g.rows[k + t] * a.x_stride * kBytes;
  __m256 sums[T][kChains] = {};
  for (int64_t i = 0; i < a.features; i += 8 * kChains) {
    const int64_t left = a.features - i;
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const __m256 d = load<D>(down, i + 8 * c, left - 8 * c);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        sums[t][c] = _mm256_fmadd_ps(d, load<D>(x[t], i + 8 * c, left - 8 * c), sums[t][c]);
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) g.inner[(k + t) * g.rank + r] = a.scale[g.adapter] * total(sums[t]);
}

template <Dtype D>
void inner(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    int64_t k = 0;
    for (; k + kRows <= g.count; k += kRows) dots<D, kRows>(a, g, r, k);
    if (k < g.count) dots<D, 1>(a, g, r, k);
  }
}

// T rows, V vectors of 8 outputs each from o on; n of the last vector exist.
template <Dtype D, int T, int V>
void tile(const LoraDeltaArgs& a, const LoraGroup& g, int64_t k, int64_t o, int64_t n) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const char* up = static_cast<const char*>(a.b) + g.adapter * a.b_stride_m * kBytes;
  const float* factors = g.inner + k * g.rank;
  __m256 sums[T][V] = {};
  for (int64_t r = 0; r < g.rank; ++r) {
    const void* from = up + r * a.b_stride_r * kBytes;
    __m256 factor[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) factor[t] = _mm256_set1_ps(factors[t * g.rank + r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const __m256 b = load<D>(from, o + 8 * v, v + 1 < V ? 8 : n);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) sums[t][v] = _mm256_fmadd_ps(factor[t], b, sums[t][v]);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    char* out = static_cast<char*>(a.out) + g.rows[k + t] * a.out_stride * kBytes;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t exist = v + 1 < V ? 8 : n;
      store<D>(out, o + 8 * v, exist, _mm256_add_ps(load<D>(out, o + 8 * v, exist), sums[t][v]));
    }
  }
}

template <Dtype D, int T>
void columns(const LoraDeltaArgs& a, const LoraGroup& g, int64_t k, int64_t begin, int64_t end) {
  constexpr int V = 8 / T;
  int64_t o = begin;
  for (; o + 8 * V <= end; o += 8 * V) tile<D, T, V>(a, g, k, o, 8);
  for (; o < end; o += 8) tile<D, T, 1>(a, g, k, o, end - o < 8 ? end - o : 8);
}

template <Dtype D>
void outputs(const LoraDeltaArgs& a, const LoraGroup& g, int64_t begin, int64_t end) {
  // As many outputs as one row's tile has: what they need of B stays in L1 for all rows of the group.
  constexpr int64_t kColumns = 64;
  for (int64_t o = begin; o < end; o += kColumns) {
    const int64_t last = end - o < kColumns ? end : o + kColumns;
    int64_t k = 0;
    for (; k + kRows <= g.count; k += kRows) columns<D, kRows>(a, g, k, o, last);
    if (k < g.count) columns<D, 1>(a, g, k, o, last);
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

}  // namespace personafast::avx2
