// masked_linear: a word of the packed mask is the __mmask32 under which 32 bf16 weights are kept, or the two __mmask16
// of 2 x 16 fp32 weights. A weight row comes from memory once and is used for every row of the batch while it is in L1.

#include <immintrin.h>

#include "kernels.h"

namespace personafast::avx512 {
namespace {

// Batch rows whose sums are in registers at one time: 4 rows x 2 chains, twice over where gamma is not 0.
constexpr int kRows = 4;

// The mask of a dense row, read again and again.
constexpr int32_t kDense = -1;

template <Dtype D>
__m512 load(const void* base, int64_t i, __mmask16 m) {
  if constexpr (D == Dtype::f32) {
    return _mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + i);
  } else {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + i));
  }
}

// Two chains of partial sums a row hide the latency of the multiply-add; which word goes to which chain depends on the
// position alone, so that a row's sum does not depend on how many rows are taken together.
template <Dtype D, int T, bool Soft>
struct Block {
  __m512 kept[T][2];
  __m512 dropped[T][2];

  // Features i to i + 31 of a weight row, of which the first `left` exist; bit j of bits[t] keeps feature i + j.
  template <int Chain>
  void word(const void* weight, const void* const* x, const uint32_t* bits, int64_t i, int64_t left) {
    const __mmask32 exist = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
    if constexpr (D == Dtype::bf16) {
      const __m512i w = _mm512_maskz_loadu_epi16(exist, static_cast<const uint16_t*>(weight) + i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512bh xt = (__m512bh)_mm512_maskz_loadu_epi16(exist, static_cast<const uint16_t*>(x[t]) + i);
        const __m512i keep = _mm512_maskz_mov_epi16(bits[t], w);
        kept[t][Chain] = _mm512_dpbf16_ps(kept[t][Chain], (__m512bh)keep, xt);
        if constexpr (Soft) {
          const __m512i drop = _mm512_maskz_mov_epi16(~bits[t], w);
          dropped[t][Chain] = _mm512_dpbf16_ps(dropped[t][Chain], (__m512bh)drop, xt);
        }
      }
    } else {
      half<0>(weight, x, bits, i, exist);
      if (left > 16) half<1>(weight, x, bits, i, exist);
    }
  }

  template <int Half>
  void half(const void* weight, const void* const* x, const uint32_t* bits, int64_t i, __mmask32 exist) {
    const __mmask16 m = static_cast<__mmask16>(exist >> (16 * Half));
    const __m512 w = load<D>(weight, i + 16 * Half, m);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __mmask16 keep = static_cast<__mmask16>(bits[t] >> (16 * Half));
      const __m512 xt = load<D>(x[t], i + 16 * Half, m);
      kept[t][Half] = _mm512_fmadd_ps(_mm512_maskz_mov_ps(keep, w), xt, kept[t][Half]);
      if constexpr (Soft) {
        dropped[t][Half] = _mm512_fmadd_ps(_mm512_maskz_mov_ps(_knot_mask16(keep), w), xt, dropped[t][Half]);
      }
    }
  }
};

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

template <Dtype D, int T, bool Soft>
void block(const MaskedLinearArgs& a, int64_t o, int64_t t0) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  const int64_t words = (a.features + 31) / 32;
  const char* weight = static_cast<const char*>(a.weight) + o * a.weight_stride * kBytes;
  const void* x[T];
  const int32_t* mask[T];
  int64_t step[T];
  for (int t = 0; t < T; ++t) {
    const int64_t slot = a.slots[t0 + t];
    x[t] = static_cast<const char*>(a.x) + (t0 + t) * a.x_stride * kBytes;
    mask[t] = slot < 0 ? &kDense : a.masks + (slot * a.outputs + o) * words;
    step[t] = slot < 0 ? 0 : 1;
  }
  Block<D, T, Soft> sum = {};
  uint32_t bits[T];
  const auto fetch = [&](int64_t w) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) bits[t] = static_cast<uint32_t>(mask[t][w * step[t]]);
  };
  int64_t w = 0;
  for (; 32 * w + 64 <= a.features; w += 2) {
    fetch(w);
    sum.template word<0>(weight, x, bits, 32 * w, 32);
    fetch(w + 1);
    sum.template word<1>(weight, x, bits, 32 * w + 32, 32);
  }
  if (w < words) {
    fetch(w);
    sum.template word<0>(weight, x, bits, 32 * w, a.features - 32 * w);
  }
  if (w + 1 < words) {
    fetch(w + 1);
    sum.template word<1>(weight, x, bits, 32 * w + 32, a.features - 32 * w - 32);
  }
  // Unrolled like every loop over t: a variable index would keep the sums in memory.
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    float y = _mm512_reduce_add_ps(_mm512_add_ps(sum.kept[t][0], sum.kept[t][1]));
    if constexpr (Soft) {
      const int64_t slot = a.slots[t0 + t];
      if (slot >= 0) y += a.gamma[slot] * _mm512_reduce_add_ps(_mm512_add_ps(sum.dropped[t][0], sum.dropped[t][1]));
    }
    if (a.bias) y += to_float<D>(a.bias, o);
    from_float<D>(a.out, (t0 + t) * a.outputs + o, y);
  }
}

template <Dtype D, bool Soft>
void outputs(const MaskedLinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    int64_t t = 0;
    for (; t + kRows <= a.rows; t += kRows) block<D, kRows, Soft>(a, o, t);
    if (a.rows - t >= 2) {
      block<D, 2, Soft>(a, o, t);
      t += 2;
    }
    if (t < a.rows) block<D, 1, Soft>(a, o, t);
  }
}

}  // namespace

void masked_linear_outputs(const MaskedLinearArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return a.gamma ? outputs<Dtype::f32, true>(a, begin, end) : outputs<Dtype::f32, false>(a, begin, end);
    case Dtype::bf16:
      return a.gamma ? outputs<Dtype::bf16, true>(a, begin, end) : outputs<Dtype::bf16, false>(a, begin, end);
    case Dtype::f16:
      return a.gamma ? outputs<Dtype::f16, true>(a, begin, end) : outputs<Dtype::f16, false>(a, begin, end);
  }
}

}  // namespace personafast::avx512
