// attend: dot products with 8 keys at a time, exponentials of 8 scores, then multiply-adds of the values on sums that
// stay in registers for a whole block of keys; all in fp32.

#include "avx2_columns.h"
#include "avx2_math.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

constexpr int kKeys = 8;

template <Dtype D>
constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;

// Elements i to i + n - 1, zero after them; n is at most 8.
template <Dtype D>
inline __m256 load8(const void* base, int64_t i, int64_t n) {
  const char* from = static_cast<const char*>(base) + i * kBytes<D>;
  char buffer[32];
  if (n < 8) {
    memset(buffer, 0, 32);
    from = static_cast<const char*>(memcpy(buffer, from, n * kBytes<D>));
  }
  if constexpr (D == Dtype::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  return widen<D>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// All bits of the first n lanes.
inline __m256 first(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), lane));
}

inline float sum_of(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float max_of(__m256 v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// Lane r is the sum of the lanes of part[r].
inline __attribute__((always_inline)) __m256 sum_lanes(const __m256 (&part)[kKeys]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(part[4], part[5]), _mm256_hadd_ps(part[6], part[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

template <Dtype D>
void scores(const AttendArgs& a, const AttendBlock& b) {
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
      __m256 sums[kKeys] = {};
      for (int64_t i = 0; i < a.width; i += 8) {
        const int64_t n = a.width - i < 8 ? a.width - i : 8;
        const __m256 query = load8<D>(b.queries[r], i, n);
#pragma GCC unroll 8
        for (int k = 0; k < kKeys; ++k) sums[k] = _mm256_fmadd_ps(query, load8<D>(key[k], i, n), sums[k]);
      }
      _mm256_storeu_ps(b.scores + r * kAttendKeys + j, sum_lanes(sums));
    }
  }
}

template <Dtype D>
void weights(const AttendArgs& a, const AttendBlock& b) {
  const __m256 least = _mm256_set1_ps(-__builtin_inff());
  const __m256 scale = _mm256_set1_ps(a.scale);
  for (int64_t r = 0; r < b.rows; ++r) {
    float* row = b.scores + r * kAttendKeys;
    __m256 most = _mm256_set1_ps(b.most[r]);
    for (int64_t j = 0; j < b.count; j += 8) {
      const int64_t n = b.count - j < 8 ? b.count - j : 8;
      __m256 seen = first(n);
      __m256 score = _mm256_mul_ps(_mm256_loadu_ps(row + j), scale);
      if (a.mask != nullptr && a.mask_adds) {
        score = _mm256_add_ps(score, load8<D>(b.masks[r], b.first + j, n));
      } else if (a.mask != nullptr) {
        int64_t bytes = 0;
        memcpy(&bytes, static_cast<const char*>(b.masks[r]) + b.first + j, n);
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
        const __m256 hidden = _mm256_castsi256_ps(_mm256_cmpeq_epi32(wide, _mm256_setzero_si256()));
        seen = _mm256_andnot_ps(hidden, seen);
      }
      score = _mm256_blendv_ps(least, score, seen);
      _mm256_storeu_ps(row + j, score);
      most = _mm256_max_ps(most, score);
    }
    const float top = max_of(most);
    const __m256 shift = _mm256_set1_ps(top == -__builtin_inff() ? 0.0f : top);
    const float keep = _mm256_cvtss_f32(exp_ps(_mm256_sub_ps(_mm256_set1_ps(b.most[r]), shift)));
    b.most[r] = top;
    b.keep[r] = keep;
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < b.count; j += 8) {
      const __m256 weight = exp_ps(_mm256_sub_ps(_mm256_loadu_ps(row + j), shift));
      _mm256_storeu_ps(row + j, weight);
      sum = _mm256_add_ps(sum, weight);
    }
    b.total[r] = b.total[r] * keep + sum_of(sum);
  }
}

// T rows, 32 columns from i on, of which n exist.
template <Dtype D, int T>
void tile(const AttendArgs& a, const AttendBlock& b, int64_t r, int64_t i, int64_t n) {
  __m256 sums[T][4];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    const __m256 keep = _mm256_set1_ps(b.keep[r + t]);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      sums[t][c] = _mm256_mul_ps(_mm256_loadu_ps(b.sums + (r + t) * b.padded + i + 8 * c), keep);
    }
  }
  const char* value = static_cast<const char*>(b.value);
  for (int64_t j = 0; j < b.count; ++j, value += a.value_stride_n * kBytes<D>) {
    const Columns v = load<D>(value, i, n);
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const __m256 weight = _mm256_set1_ps(b.scores[(r + t) * kAttendKeys + j]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[t][c] = _mm256_fmadd_ps(weight, v.part[c], sums[t][c]);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm256_storeu_ps(b.sums + (r + t) * b.padded + i + 8 * c, sums[t][c]);
  }
}

template <Dtype D>
void values(const AttendArgs& a, const AttendBlock& b) {
  const char* next = static_cast<const char*>(b.next);
  for (int64_t j = 0; next != nullptr && j < b.count; ++j) {
    for (int64_t line = 0; line < a.width * kBytes<D>; line += 64) {
      _mm_prefetch(next + j * a.key_stride_n * kBytes<D> + line, _MM_HINT_T0);
    }
  }
  int64_t r = 0;
  for (; r + 2 <= b.rows; r += 2) {
    for_columns(a.width, [&](int64_t i, int64_t n) { tile<D, 2>(a, b, r, i, n); });
  }
  if (r < b.rows) for_columns(a.width, [&](int64_t i, int64_t n) { tile<D, 1>(a, b, r, i, n); });
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

}  // namespace personafast::avx2
