// masked_linear: each byte of a mask word becomes a vector mask of 8 fp32 weights; the four bytes are four chains of
// partial sums.

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace personafast::avx2 {
namespace {

// Batch rows that share the widened weights of one word: 2 rows x 4 chains of sums fit the 16 registers.
constexpr int kRows = 2;

// Features i to i + n - 1, zeros after them; n is at most 8 and may be negative.
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

template <Dtype D>
float to_float(const void* base, int64_t i) {
  return _mm256_cvtss_f32(load<D>(base, i, 1));
}

template <Dtype D>
void from_float(void* base, int64_t i, float value) {
  if constexpr (D == Dtype::f32) {
    static_cast<float*>(base)[i] = value;
  } else if constexpr (D == Dtype::f16) {
    static_cast<uint16_t*>(base)[i] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const uint32_t bits = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(value))));
    const uint32_t rounded = value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(rounded >> 16);
  }
}

float total(const __m256* chain) {
  const __m256 sum = _mm256_add_ps(_mm256_add_ps(chain[0], chain[1]), _mm256_add_ps(chain[2], chain[3]));
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

template <Dtype D, int T, bool Soft>
void block(const MaskedLinearArgs& a, int64_t o, const int64_t* rows) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const int64_t words = (a.features + 31) / 32;
  const char* weight = static_cast<const char*>(a.weight) + o * a.weight_stride * kBytes;
  const void* x[T];
  const int32_t* mask[T];
  for (int t = 0; t < T; ++t) {
    const int64_t slot = a.slots ? a.slots[rows[t]] : -1;
    x[t] = static_cast<const char*>(a.x) + rows[t] * a.x_stride * kBytes;
    mask[t] = slot < 0 ? nullptr : a.masks + (slot * a.outputs + o) * words;
  }
  __m256 kept[T][4] = {};
  __m256 dropped[T][4] = {};
  for (int64_t w = 0; w < words; ++w) {
    const int64_t left = a.features - 32 * w;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const int64_t n = left - 8 * c < 8 ? left - 8 * c : 8;
      const __m256 wc = load<D>(weight, 32 * w + 8 * c, n);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        const uint32_t bits = mask[t] ? static_cast<uint32_t>(mask[t][w]) : 0xffffffffu;
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits >> (8 * c))), lane_bit);
        const __m256 keep = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit));
        const __m256 xc = load<D>(x[t], 32 * w + 8 * c, n);
        kept[t][c] = _mm256_fmadd_ps(_mm256_and_ps(keep, wc), xc, kept[t][c]);
        if constexpr (Soft) dropped[t][c] = _mm256_fmadd_ps(_mm256_andnot_ps(keep, wc), xc, dropped[t][c]);
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    float y = total(kept[t]);
    if constexpr (Soft) {
      const int64_t slot = a.slots ? a.slots[rows[t]] : -1;
      if (slot >= 0) y += a.gamma[slot] * total(dropped[t]);
    }
    if (a.bias) y += to_float<D>(a.bias, o);
    from_float<D>(a.out, rows[t] * a.outputs + o, y);
  }
}

template <Dtype D, bool Soft>
void outputs(const MaskedLinearArgs& a, const LinearPlan& plan, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    int64_t k = 0;
    for (; k + kRows <= plan.rows; k += kRows) block<D, kRows, Soft>(a, o, plan.order + k);
    if (k < plan.rows) block<D, 1, Soft>(a, o, plan.order + k);
  }
}

}  // namespace

void masked_linear_outputs(const MaskedLinearArgs& a, const LinearPlan& plan, Scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return a.gamma ? outputs<Dtype::f32, true>(a, plan, begin, end) : outputs<Dtype::f32, false>(a, plan, begin, end);
    case Dtype::bf16:
      return a.gamma ? outputs<Dtype::bf16, true>(a, plan, begin, end)
                     : outputs<Dtype::bf16, false>(a, plan, begin, end);
    case Dtype::f16:
      return a.gamma ? outputs<Dtype::f16, true>(a, plan, begin, end) : outputs<Dtype::f16, false>(a, plan, begin, end);
  }
}

}  // namespace personafast::avx2
