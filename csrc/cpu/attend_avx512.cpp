// attend: dot products with 16 keys at a time (dpbf16 for bf16), exponentials of 16 scores, then multiply-adds of the
// values, in fp32, on sums that stay in registers for a whole block of keys.

#include "avx512_columns.h"
#include "avx512_math.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

constexpr int kKeys = 16;

// Rows that share a load of a value.
constexpr int kRows = 4;

template <Dtype D>
constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;

template <Dtype D>
__m512 load16(const void* from, __mmask16 m) {
  if constexpr (D == Dtype::f32) return _mm512_maskz_loadu_ps(m, from);
  const __m256i half = _mm256_maskz_loadu_epi16(m, from);
  if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Lane r is the sum of the lanes of part[r].
inline __attribute__((always_inline)) __m512 sum_lanes(const __m512 (&part)[kKeys]) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const __m512 p[4] = {part[4 * g], part[4 * g + 1], part[4 * g + 2], part[4 * g + 3]};
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3]));
    four[g] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xee));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// Query and keys from column i on, of which the first `exist` of 32 (bf16) or 16 do.
template <Dtype D>
inline __attribute__((always_inline)) void multiply(__m512 (&sums)[kKeys], const char* query, const char* const* key,
                                                    int64_t i, __mmask32 exist) {
  const char* from = query + i * kBytes<D>;
  if constexpr (D == Dtype::bf16) {
    const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(exist, from);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) {
      sums[k] = _mm512_dpbf16_ps(sums[k], q, (__m512bh)_mm512_maskz_loadu_epi16(exist, key[k] + i * kBytes<D>));
    }
  } else {
    const __mmask16 m = static_cast<__mmask16>(exist);
    const __m512 q = load16<D>(from, m);
#pragma GCC unroll 16
    for (int k = 0; k < kKeys; ++k) sums[k] = _mm512_fmadd_ps(q, load16<D>(key[k] + i * kBytes<D>, m), sums[k]);
  }
}

template <Dtype D>
void scores(const AttendArgs& a, const AttendBlock& b) {
  constexpr int64_t kStep = D == Dtype::bf16 ? 32 : 16;
  for (int64_t j = 0; j < b.count; j += kKeys) {
    const char* key[kKeys];
    for (int64_t k = 0; k < kKeys; ++k) {
      // Beyond the last the last again.
      const int64_t at = j + k < b.count ? j + k : b.count - 1;
      key[k] = static_cast<const char*>(b.key) + at * a.key_stride_n * kBytes<D>;
      const char* value = static_cast<const char*>(b.value) + at * a.value_stride_n * kBytes<D>;
      for (int64_t line = 0; line < a.width * kBytes<D>; line += 64) _mm_prefetch(value + line, _MM_HINT_T0);
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      const char* query = static_cast<const char*>(b.queries[r]);
      __m512 sums[kKeys] = {};
      int64_t i = 0;
      for (; i + kStep <= a.width; i += kStep) multiply<D>(sums, query, key, i, 0xffffffffu);
      if (i < a.width) multiply<D>(sums, query, key, i, first(a.width - i));
      _mm512_storeu_ps(b.scores + r * kAttendKeys + j, sum_lanes(sums));
    }
  }
}

template <Dtype D>
void weights(const AttendArgs& a, const AttendBlock& b) {
  const __m512 least = _mm512_set1_ps(-__builtin_inff());
  const __m512 scale = _mm512_set1_ps(a.scale);
  for (int64_t r = 0; r < b.rows; ++r) {
    float* row = b.scores + r * kAttendKeys;
    __m512 most = _mm512_set1_ps(b.most[r]);
    for (int64_t j = 0; j < b.count; j += 16) {
      __mmask16 seen = static_cast<__mmask16>(first(b.count - j));
      __m512 score = _mm512_mul_ps(_mm512_loadu_ps(row + j), scale);
      if (a.mask != nullptr) {
        const char* mask = static_cast<const char*>(b.masks[r]) + (b.first + j) * (a.mask_adds ? kBytes<D> : 1);
        if (a.mask_adds) {
          score = _mm512_add_ps(score, load16<D>(mask, seen));
        } else {
          const __m128i bytes = _mm_maskz_loadu_epi8(seen, mask);
          seen = _mm_test_epi8_mask(bytes, bytes);
        }
      }
      score = _mm512_mask_mov_ps(least, seen, score);
      _mm512_storeu_ps(row + j, score);
      most = _mm512_max_ps(most, score);
    }
    const float top = _mm512_reduce_max_ps(most);
    const __m512 shift = _mm512_set1_ps(top == -__builtin_inff() ? 0.0f : top);
    const float keep = _mm512_cvtss_f32(exp_ps(_mm512_sub_ps(_mm512_set1_ps(b.most[r]), shift)));
    b.most[r] = top;
    b.keep[r] = keep;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < b.count; j += 16) {
      const __m512 weight = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(row + j), shift));
      _mm512_storeu_ps(row + j, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    b.total[r] = b.total[r] * keep + _mm512_reduce_add_ps(sum);
  }
}

// T rows, C times 32 columns from i on, of the last of which n exist.
template <Dtype D, int T, int C>
void tile(const AttendArgs& a, const AttendBlock& b, int64_t r, int64_t i, int64_t n) {
  __m512 sums[T][C][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const __m512 keep = _mm512_set1_ps(b.keep[r + t]);
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const float* from = b.sums + (r + t) * b.padded + i + 32 * c;
      sums[t][c][0] = _mm512_mul_ps(_mm512_loadu_ps(from), keep);
      sums[t][c][1] = _mm512_mul_ps(_mm512_loadu_ps(from + 16), keep);
    }
  }
  const char* value = static_cast<const char*>(b.value);
  for (int64_t j = 0; j < b.count; ++j, value += a.value_stride_n * kBytes<D>) {
    Columns v[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) v[c] = load<D>(value, i + 32 * c, C == 1 ? n : 32);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m512 weight = _mm512_set1_ps(b.scores[(r + t) * kAttendKeys + j]);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        sums[t][c][0] = _mm512_fmadd_ps(weight, v[c].part[0], sums[t][c][0]);
        sums[t][c][1] = _mm512_fmadd_ps(weight, v[c].part[1], sums[t][c][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      float* to = b.sums + (r + t) * b.padded + i + 32 * c;
      _mm512_storeu_ps(to, sums[t][c][0]);
      _mm512_storeu_ps(to + 16, sums[t][c][1]);
    }
  }
}

template <Dtype D, int T>
void columns(const AttendArgs& a, const AttendBlock& b, int64_t r) {
  int64_t i = 0;
  for (; i + 64 <= a.width; i += 64) tile<D, T, 2>(a, b, r, i, 32);
  for (; i < a.width; i += 32) tile<D, T, 1>(a, b, r, i, a.width - i < 32 ? a.width - i : 32);
}

template <Dtype D>
void values(const AttendArgs& a, const AttendBlock& b) {
  const char* next = static_cast<const char*>(b.next);
  for (int64_t j = 0; next != nullptr && j < b.count; ++j) {
    for (int64_t line = 0; line < a.width * kBytes<D>; line += 64) {
      _mm_prefetch(next + j * a.key_stride_n * kBytes<D> + line, _MM_HINT_T0);
    }
  }
  for (int64_t r = 0; r < b.rows;) {
    switch (b.rows - r) {
      case 1:
        columns<D, 1>(a, b, r);
        r += 1;
        break;
      case 2:
        columns<D, 2>(a, b, r);
        r += 2;
        break;
      case 3:
        columns<D, 3>(a, b, r);
        r += 3;
        break;
      default:
        columns<D, kRows>(a, b, r);
        r += kRows;
    }
  }
}

template <Dtype D>
void quotients(const AttendArgs& a, const AttendBlock& b) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const Columns part = all(b.total[r] == 0.0f ? 0.0f : 1.0f / b.total[r]);
    for_columns(a.width, [&](int64_t i, int64_t n) {
      store<D>(b.out[r], i, n, load<Dtype::f32>(b.sums + r * b.padded, i, 32) * part);
    });
  }
}

template <Dtype D>
void block(const AttendArgs& a, const AttendBlock& b) {
  scores<D>(a, b);
  weights<D>(a, b);
  values<D>(a, b);
  if (b.last) quotients<D>(a, b);
}

}  // namespace

void attend_block(const AttendArgs& a, const AttendBlock& b) {
  switch (a.dtype) {
    case Dtype::f32:
      return block<Dtype::f32>(a, b);
    case Dtype::bf16:
      return block<Dtype::bf16>(a, b);
    case Dtype::f16:
      return block<Dtype::f16>(a, b);
  }
}

}  // namespace personafast::avx512
