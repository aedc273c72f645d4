// sparse_linear: a block of a weight row is spread over a buffer in L1, bit by bit, and multiplied from there.

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace personafast::avx2 {
namespace {

constexpr int64_t kBlock = 1024;

// Four chains of 8 partial sums a row.
constexpr int kChains = 4;

template <Dtype D>
float to_float(const void* base, int64_t i) {
  if constexpr (D == Dtype::f32) {
    return static_cast<const float*>(base)[i];
  } else {
    const uint16_t bits = static_cast<const uint16_t*>(base)[i];
    if constexpr (D == Dtype::f16) return _cvtsh_ss(bits);
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(static_cast<uint32_t>(bits) << 16))));
  }
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

// Features i to i + 7 of x, zeros after the first `left`.
template <Dtype D>
__m256 load(const void* base, int64_t i, int64_t left) {
  alignas(32) float buffer[8] = {};
  if (left < 8) {
    for (int64_t j = 0; j < left; ++j) buffer[j] = to_float<D>(base, i + j);
    return _mm256_load_ps(buffer);
  }
  if constexpr (D == Dtype::f32) {
    return _mm256_loadu_ps(static_cast<const float*>(base) + i);
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + i));
    if constexpr (D == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

float total(const __m256* chain) {
  const __m256 sum = _mm256_add_ps(_mm256_add_ps(chain[0], chain[1]), _mm256_add_ps(chain[2], chain[3]));
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// The weights that `bits` keeps of `features` columns, from values[next] on; returns where the following ones are.
template <Dtype D>
int64_t spread(const SparseLinearArgs& a, const int32_t* bits, int64_t features, int64_t next, float* to) {
  for (int64_t w = 0; 32 * w < features; ++w) {
    const int64_t left = features - 32 * w;
    uint32_t kept = static_cast<uint32_t>(bits[w]) & (left >= 32 ? 0xffffffffu : (1u << left) - 1u);
    memset(to + 32 * w, 0, 32 * sizeof(float));
    for (; kept != 0 && next < a.value_count; kept &= kept - 1) {
      to[32 * w + __builtin_ctz(kept)] = to_float<D>(a.values, next++);
    }
  }
  return next;
}

template <Dtype D>
void outputs(const SparseLinearArgs& a, const LinearPlan& plan, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const int64_t words = (a.features + 31) / 32;
  alignas(32) float weights[kBlock];
  __m256 sums[kPlanRows][kChains];
  for (int64_t o = begin; o < end; ++o) {
    memset(sums, 0, sizeof(sums));
    int64_t next = a.row_offsets[o];
    for (int64_t i = 0; i < a.features; i += kBlock) {
      const int64_t features = a.features - i < kBlock ? a.features - i : kBlock;
      next = spread<D>(a, a.bitmap + o * words + i / 32, features, next, weights);
      for (int64_t k = 0; k < plan.rows; ++k) {
        const void* x = static_cast<const char*>(a.x) + (plan.order[k] * a.x_stride + i) * kBytes;
        for (int64_t j = 0; j < features; j += 8 * kChains) {
#pragma GCC unroll 4
          for (int c = 0; c < kChains; ++c) {
            const __m256 xc = load<D>(x, j + 8 * c, features - j - 8 * c);
            sums[k][c] = _mm256_fmadd_ps(_mm256_load_ps(weights + j + 8 * c), xc, sums[k][c]);
          }
        }
      }
    }
    for (int64_t k = 0; k < plan.rows; ++k) {
      float y = total(sums[k]);
      if (a.bias) y += to_float<D>(a.bias, o);
      from_float<D>(a.out, plan.order[k] * a.outputs + o, y);
    }
  }
}

}  // namespace

void sparse_linear_outputs(const SparseLinearArgs& a, const LinearPlan& plan, Scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return outputs<Dtype::f32>(a, plan, begin, end);
    case Dtype::bf16:
      return outputs<Dtype::bf16>(a, plan, begin, end);
    case Dtype::f16:
      return outputs<Dtype::f16>(a, plan, begin, end);
  }
}

}  // namespace personafast::avx2
