// token_logprobs: four chains of 8 partial sums a logit.

#include <immintrin.h>
#include <math.h>

#include "kernels.h"

namespace personafast::avx2 {
namespace {

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

template <Dtype D>
float dot(const void* word, const void* hidden, int64_t features) {
  __m256 chains[4] = {};
  for (int64_t i = 0; i < features; i += 32) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const int64_t left = features - i - 8 * c;
      chains[c] = _mm256_fmadd_ps(load<D>(word, i + 8 * c, left), load<D>(hidden, i + 8 * c, left), chains[c]);
    }
  }
  return total(chains);
}

// Logits of one row of the batch go into its running maximum and sum of exponentials.
template <Dtype D>
void panel(const TokenLogprobsArgs& a, int64_t t, int64_t from, int64_t count, LogSum& sum, float& target) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const void* hidden = static_cast<const char*>(a.hidden) + t * a.hidden_stride * kBytes;
  float logits[kLogitPanel];
  float max = sum.max;
  for (int64_t j = 0; j < count; ++j) {
    const void* word = static_cast<const char*>(a.head) + (from + j) * a.head_stride * kBytes;
    float l = dot<D>(word, hidden, a.features);
    if (a.bias) l += to_float<D>(a.bias, from + j);
    if (a.logit_scale != 1.0f) l *= a.logit_scale;
    if (a.softcap > 0.0f) l = a.softcap * tanhf(l / a.softcap);
    if (a.temperature) l /= a.temperature[t];
    if (from + j == a.tokens[t]) target = l;
    if (l > max) max = l;
    logits[j] = l;
  }
  const float shift = max == -__builtin_inff() ? 0.0f : max;
  if (max != sum.max) {
    sum.sum *= expf(sum.max - max);
    sum.max = max;
  }
  for (int64_t j = 0; j < count; ++j) sum.sum += expf(logits[j] - shift);
}

template <Dtype D>
void all_parts(const TokenLogprobsArgs& a, const LinearPlan& plan, int64_t part, int64_t begin, int64_t end,
               LogSum* sums, float* target) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t until = (p + 1) * part < a.vocabulary ? (p + 1) * part : a.vocabulary;
    for (int64_t k = 0; k < plan.rows; ++k) sums[p * kPlanRows + k] = {-__builtin_inff(), 0.0f};
    for (int64_t from = p * part; from < until; from += kLogitPanel) {
      const int64_t count = until - from < kLogitPanel ? until - from : kLogitPanel;
      for (int64_t k = 0; k < plan.rows; ++k) {
        panel<D>(a, plan.order[k], from, count, sums[p * kPlanRows + k], target[k]);
      }
    }
  }
}

}  // namespace

void token_logprobs_parts(const TokenLogprobsArgs& a, const LinearPlan& plan, Scratch, int64_t part, int64_t begin,
                          int64_t end, LogSum* sums, float* target) {
  switch (a.dtype) {
    case Dtype::f32:
      return all_parts<Dtype::f32>(a, plan, part, begin, end, sums, target);
    case Dtype::bf16:
      return all_parts<Dtype::bf16>(a, plan, part, begin, end, sums, target);
    case Dtype::f16:
      return all_parts<Dtype::f16>(a, plan, part, begin, end, sums, target);
  }
}

}  // namespace personafast::avx2
