// aggregate_logits: 64 tokens at a time, one vector of 16 at the end of a block.

#include "avx512_float.h"
#include "avx512_math.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

constexpr __mmask16 kAll = 0xffff;
constexpr float kInfinity = __builtin_inff();

// Vectors that are worked on side by side, which hides the latency of exp.
constexpr int kVectors = 4;

// The largest value of a block so far, and whether one is no number.
struct Maximum {
  __m512 values = _mm512_set1_ps(-kInfinity);
  __mmask16 nan = 0;

  void see(__m512 value) {
    // Of an operand that is NaN max returns the second.
    values = _mm512_max_ps(value, values);
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  }

  void join(const Maximum& other) {
    values = _mm512_max_ps(other.values, values);
    nan |= other.nan;
  }

  float get() const { return nan ? __builtin_nanf("") : _mm512_reduce_max_ps(values); }
};

// Sum of exp(x - max); max is finite.
template <Dtype D>
float sum_exp(const void* x, int64_t begin, int64_t end, float max) {
  const __m512 top = _mm512_set1_ps(max);
  __m512 sums[kVectors] = {};
  int64_t i = begin;
  for (; i + 16 * kVectors <= end; i += 16 * kVectors) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = _mm512_add_ps(sums[v], exp_ps(_mm512_sub_ps(load<D>(x, i + 16 * v, kAll), top)));
    }
  }
  for (; i < end; i += 16) {
    const __mmask16 m = first(end - i);
    sums[0] = _mm512_mask_add_ps(sums[0], m, sums[0], exp_ps(_mm512_sub_ps(load<D>(x, i, m), top)));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// end - begin is at most kLogitsTile.
template <Dtype D>
float max_of(const void* x, int64_t begin, int64_t end) {
  Maximum maxima[kVectors];
  int64_t i = begin;
  for (; i + 16 * kVectors <= end; i += 16 * kVectors) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) maxima[v].see(load<D>(x, i + 16 * v, kAll));
  }
  for (; i < end; i += 16) {
    const __mmask16 m = first(end - i);
    maxima[0].see(_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), m, load<D>(x, i, m)));
  }
  for (int v = 1; v < kVectors; ++v) maxima[0].join(maxima[v]);
  return maxima[0].get();
}

template <Dtype D>
void max_of_tiles(const void* x, int64_t begin, int64_t end, float* maxima) {
  for (int64_t i = begin; i < end; i += kLogitsTile) {
    *maxima++ = max_of<D>(x, i, end - i < kLogitsTile ? end : i + kLogitsTile);
  }
}

// Tokens i to i + 15 that a member of the blend excludes.
template <Dtype D>
__mmask16 barred(const LogitsBlend& b, int64_t i, __mmask16 m) {
  __mmask16 found = 0;
  for (int64_t n = 0; n < b.count; ++n) {
    const __m512 x = _mm512_sub_ps(load<D>(b.members[n].logits, i, m), _mm512_set1_ps(b.members[n].shift));
    found |= _mm512_cmp_ps_mask(x, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
  }
  return found;
}

template <Dtype D, int V>
void geometric(const LogitsBlend& b, int64_t i, __mmask16 m, __m512* target, __mmask16* kept) {
  for (int v = 0; v < V; ++v) target[v] = _mm512_setzero_ps();
  for (int64_t n = 0; n < b.count; ++n) {
    const LogitsMember& member = b.members[n];
    const __m512 shift = _mm512_set1_ps(member.shift);
    const __m512 weight = _mm512_set1_ps(member.weight);
    const __m512 floor = _mm512_set1_ps(member.floor);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 x = _mm512_sub_ps(load<D>(member.logits, i + 16 * v, m), shift);
      target[v] = _mm512_fmadd_ps(weight, x, target[v]);
      kept[v] |= _mm512_cmp_ps_mask(x, floor, _CMP_GE_OQ);
    }
  }
  for (int v = 0; v < V; ++v) {
    // What is -inf under a negative weight, or under weights of both signs, is neither finite nor -inf here.
    if (_mm512_cmp_ps_mask(target[v], _mm512_set1_ps(kInfinity), _CMP_NLT_UQ)) {
      target[v] = _mm512_mask_mov_ps(target[v], barred<D>(b, i + 16 * v, m), _mm512_set1_ps(-kInfinity));
    }
  }
}

template <Dtype D, int V>
void mixture(const LogitsBlend& b, int64_t i, __mmask16 m, __m512* target, __mmask16* kept) {
  // Finite, so that a token no member can produce is exp(-inf) and not exp(NaN).
  __m512 top[V];
  for (int v = 0; v < V; ++v) top[v] = _mm512_set1_ps(-__FLT_MAX__);
  for (int64_t n = 0; n < b.count; ++n) {
    const LogitsMember& member = b.members[n];
    const __m512 shift = _mm512_set1_ps(member.shift);
    const __m512 weight = _mm512_set1_ps(member.weight);
    const __m512 floor = _mm512_set1_ps(member.floor);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 x = _mm512_sub_ps(load<D>(member.logits, i + 16 * v, m), shift);
      top[v] = _mm512_max_ps(top[v], _mm512_add_ps(weight, x));
      kept[v] |= _mm512_cmp_ps_mask(x, floor, _CMP_GE_OQ);
    }
  }
  __m512 sum[V];
  for (int v = 0; v < V; ++v) sum[v] = _mm512_setzero_ps();
  for (int64_t n = 0; n < b.count; ++n) {
    const LogitsMember& member = b.members[n];
    const __m512 shift = _mm512_set1_ps(member.shift);
    const __m512 weight = _mm512_set1_ps(member.weight);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 x = _mm512_add_ps(weight, _mm512_sub_ps(load<D>(member.logits, i + 16 * v, m), shift));
      sum[v] = _mm512_add_ps(sum[v], exp_ps(_mm512_sub_ps(x, top[v])));
    }
  }
  for (int v = 0; v < V; ++v) target[v] = _mm512_add_ps(top[v], log_ps(sum[v]));
}

template <Dtype D, int V>
void tile(const LogitsBlend& b, int64_t i, __mmask16 m, Maximum* maxima) {
  __m512 target[V];
  __mmask16 kept[V] = {};
  if (b.mixture) {
    mixture<D, V>(b, i, m, target, kept);
  } else {
    geometric<D, V>(b, i, m, target, kept);
  }
  const __m512 low = _mm512_set1_ps(-kInfinity);
  for (int v = 0; v < V; ++v) {
    // NaN is in no support, and stays.
    const __mmask16 nan = _mm512_cmp_ps_mask(target[v], target[v], _CMP_UNORD_Q);
    if (b.masked) target[v] = _mm512_mask_mov_ps(low, static_cast<__mmask16>(kept[v] | nan), target[v]);
    _mm512_mask_storeu_ps(b.out + i + 16 * v, m, target[v]);
    maxima[v].see(_mm512_mask_mov_ps(low, m, target[v]));
  }
}

template <Dtype D>
float blend(const LogitsBlend& b, int64_t begin, int64_t end) {
  Maximum maxima[kVectors];
  int64_t i = begin;
  for (; i + 16 * kVectors <= end; i += 16 * kVectors) tile<D, kVectors>(b, i, kAll, maxima);
  for (; i < end; i += 16) tile<D, 1>(b, i, first(end - i), maxima);
  for (int v = 1; v < kVectors; ++v) maxima[0].join(maxima[v]);
  return maxima[0].get();
}

}  // namespace

void logits_max(const void* logits, Dtype dtype, int64_t begin, int64_t end, float* maxima) {
  switch (dtype) {
    case Dtype::f32:
      return max_of_tiles<Dtype::f32>(logits, begin, end, maxima);
    case Dtype::bf16:
      return max_of_tiles<Dtype::bf16>(logits, begin, end, maxima);
    case Dtype::f16:
      return max_of_tiles<Dtype::f16>(logits, begin, end, maxima);
  }
}

void logits_sum_exp(const void* logits, Dtype dtype, int64_t begin, int64_t end, float max, float* sum) {
  switch (dtype) {
    case Dtype::f32:
      *sum = sum_exp<Dtype::f32>(logits, begin, end, max);
      return;
    case Dtype::bf16:
      *sum = sum_exp<Dtype::bf16>(logits, begin, end, max);
      return;
    case Dtype::f16:
      *sum = sum_exp<Dtype::f16>(logits, begin, end, max);
      return;
  }
}

void logits_blend(const LogitsBlend& b, int64_t begin, int64_t end, float* max) {
  switch (b.dtype) {
    case Dtype::f32:
      *max = blend<Dtype::f32>(b, begin, end);
      return;
    case Dtype::bf16:
      *max = blend<Dtype::bf16>(b, begin, end);
      return;
    case Dtype::f16:
      *max = blend<Dtype::f16>(b, begin, end);
      return;
  }
}

void logits_shift(float* out, int64_t begin, int64_t end, float norm) {
  const __m512 by = _mm512_set1_ps(norm);
  for (int64_t i = begin; i < end; i += 16) {
    const __mmask16 m = first(end - i);
    _mm512_mask_storeu_ps(out + i, m, _mm512_sub_ps(load<Dtype::f32>(out, i, m), by));
  }
}

}  // namespace personafast::avx512
