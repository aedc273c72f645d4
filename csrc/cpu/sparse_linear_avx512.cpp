// sparse_linear: a word of the bitmap is the mask under which the next weights of a row are spread over 32 lanes
// (VPEXPANDW). For a few rows of x they are multiplied at once; for more, blocks of four weight rows are spread into
// L1, where the tiles of masked_linear multiply them. Both sum in the order of avx512_dot.h.

#include <immintrin.h>

#include "avx512_dot.h"
#include "kernels.h"

namespace personafast::avx512 {
namespace {

// Up to so many rows of x a weight is multiplied as soon as it is spread.
constexpr int64_t kAtOnce = 3;

// VPEXPAND waits for the last value of the register it writes, though it keeps nothing of it (seen on Zen 5: 2.0 cycles
// a word with the register cleared first, 5.8 without), and no intrinsic says which register that is.
inline __m512i expand16(__mmask32 bits, __m512i values) {
  __m512i spread;
  asm("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}%{z%}" : "=&v"(spread) : "v"(values), "Yk"(bits));
  return spread;
}

inline __m512i expand32(__mmask16 bits, __m512i values) {
  __m512i spread;
  asm("vpxord %0, %0, %0\n\tvpexpandd %1, %0%{%2%}%{z%}" : "=&v"(spread) : "v"(values), "Yk"(bits));
  return spread;
}

// Reads the weights of one row in order.
template <Dtype D>
struct Reader {
  const char* next;
  const char* end;

  // The next weights on the lanes that `bits` keeps, zeros on the others: 32 of bf16 and f16, 16 of f32. Unless Inside,
  // no more are read than there are.
  template <bool Inside>
  __attribute__((always_inline)) __m512i spread(uint32_t bits) {
    __m512i kept;
    if constexpr (D == Dtype::f32) {
      const __mmask16 there = Inside ? 0xffff : static_cast<__mmask16>(first_bits((end - next) / 4));
      kept = expand32(static_cast<__mmask16>(bits), _mm512_maskz_loadu_epi32(there, next));
      next += 4 * _mm_popcnt_u32(bits & 0xffffu);
    } else {
      const __m512i values =
          Inside ? _mm512_loadu_si512(next) : _mm512_maskz_loadu_epi16(first_bits((end - next) / 2), next);
      kept = expand16(bits, values);
      next += 2 * _mm_popcnt_u32(bits);
    }
    if (!Inside && next > end) next = end;
    return kept;
  }
};

// kGroup rows by T rows of x, one block, as Tile sums it.
template <Dtype D, int T>
struct SparseTile {
  static constexpr int kParts = D == Dtype::bf16 ? 1 : 2;

  __m512 sums[T][kGroup];

  template <bool Inside>
  static const char* run(Reader<D>* readers, const int32_t* bitmap, int64_t step, const char* x, int64_t features,
                         const char* fetch, int64_t bytes_per_word, float* to, bool first) {
    Reader<D> rows[kGroup];
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) rows[r] = readers[r];
    SparseTile tile = {};
    const int64_t whole = features / kWord;
    for (int64_t w = 0; w < whole; ++w) {
      tile.template word<Inside>(rows, bitmap + w, step, 0xffffffffu, x + w * T * kWord * kPackedBytes<D>);
      // Two lines at a time: a group may have up to four a word.
      _mm_prefetch(fetch, _MM_HINT_T0);
      _mm_prefetch(fetch + 64, _MM_HINT_T0);
      fetch += bytes_per_word;
    }
    if (features > kWord * whole) {
      tile.template word<Inside>(rows, bitmap + whole, step, first_bits(features - kWord * whole),
                                 x + whole * T * kWord * kPackedBytes<D>);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) readers[r] = rows[r];
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) {
      const __m128 block = sum_lanes(tile.sums[t][0], tile.sums[t][1], tile.sums[t][2], tile.sums[t][3]);
      float* sum = to + kGroup * t;
      _mm_storeu_ps(sum, first ? block : _mm_add_ps(_mm_loadu_ps(sum), block));
    }
    return fetch;
  }

  template <bool Inside>
  __attribute__((always_inline)) void word(Reader<D>* rows, const int32_t* bitmap, int64_t step, uint32_t exist,
                                           const char* x) {
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r) {
      const uint32_t bits = static_cast<uint32_t>(bitmap[r * step]) & exist;
      if constexpr (D == Dtype::f32) {
        multiply(r, 0, rows[r].template spread<Inside>(bits), x);
        multiply(r, 1, rows[r].template spread<Inside>(bits >> 16), x);
      } else {
        const __m512i weights = rows[r].template spread<Inside>(bits);
        if constexpr (D == Dtype::bf16) {
          multiply(r, 0, weights, x);
        } else {
          multiply(r, 0, _mm512_castps_si512(_mm512_cvtph_ps(_mm512_castsi512_si256(weights))), x);
          multiply(r, 1, _mm512_castps_si512(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(weights, 1))), x);
        }
      }
    }
  }

  __attribute__((always_inline)) void multiply(int r, int part, __m512i weights, const char* x) {
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) {
      Tile<D, 1, Keep::all, false>::multiply(sums[t][r], weights, _mm512_load_si512(x + (t * kParts + part) * 64));
    }
  }
};

template <Dtype D>
struct Sparse {
  const SparseLinearArgs& a;
  Linear<D, false> linear;
  const bool at_once = linear.plan.count == 1 && linear.plan.rows <= kAtOnce;
  alignas(64) char block[kGroup * kBlock * kBytes<D>];

  Sparse(const SparseLinearArgs& args, const LinearPlan& plan, Scratch scratch)
      : a(args), linear({args.x, args.x_stride, nullptr, 0, nullptr, args.outputs, args.features}, plan, scratch) {}

  const char* value(int64_t i) const { return static_cast<const char*>(a.values) + i * kBytes<D>; }

  // Outputs o to o + count - 1, of which there are kGroup or one; the thread's own end at `last`.
  void group(int64_t o, int count, int64_t last) {
    const char* end = value(a.value_count);
    const bool whole = count == kGroup;
    Reader<D> rows[kGroup];
    for (int r = 0; r < kGroup; ++r) rows[r] = {value(a.row_offsets[whole ? o + r : o]), end};
    // The values of the next group lie behind those of this one: so many bytes of them a word spread them evenly.
    const int64_t after = o + count;
    const int64_t until = after + kGroup < last ? after + kGroup : last;
    const char* fetch = value(a.row_offsets[after]);
    const int64_t bytes_per_word = linear.words > 0 ? (value(a.row_offsets[until]) - fetch) / linear.words : 0;
    for (int64_t b = 0; b < linear.blocks; ++b) {
      const int64_t left = a.features - b * kBlock;
      const int64_t features = left < kBlock ? left : kBlock;
      const int32_t* bitmap = a.bitmap + o * linear.words + b * (kBlock / kWord);
      const int64_t step = whole ? linear.words : 0;
      Linear<D, false>::fetch_masks(a.bitmap + after * linear.words, b);
      // A row whose bitmap keeps more than the row has may be ahead of the last one.
      const char* furthest = rows[0].next;
      for (int r = 1; r < kGroup; ++r) furthest = rows[r].next > furthest ? rows[r].next : furthest;
      const bool inside = end - furthest >= (kBlock + kWord) * kBytes<D>;
      if (at_once) {
        fetch = inside ? multiply<true>(rows, bitmap, step, b, features, fetch, bytes_per_word)
                       : multiply<false>(rows, bitmap, step, b, features, fetch, bytes_per_word);
      } else {
        for (int r = 0; r < count; ++r) {
          char* to = block + r * kBlock * kBytes<D>;
          fetch = inside ? spread<true>(rows[r], bitmap + r * step, features, to, fetch, bytes_per_word / kGroup)
                         : spread<false>(rows[r], bitmap + r * step, features, to, fetch, bytes_per_word / kGroup);
        }
        linear.block(b, block, whole ? kBlock : 0, 0, 0, nullptr, false);
      }
    }
    const __m128 bias = a.bias ? load4<D>(a.bias, o, count) : _mm_setzero_ps();
    for (int64_t k = 0; k < linear.plan.rows; ++k) {
      const __m128 y = _mm_load_ps(linear.kept + kGroup * k);
      store4<D>(a.out, linear.plan.order[k] * a.outputs + o, _mm_add_ps(y, bias), count);
    }
  }

  template <bool Inside>
  const char* multiply(Reader<D>* rows, const int32_t* bitmap, int64_t step, int64_t b, int64_t features,
                       const char* fetch, int64_t bytes_per_word) {
    const auto& tile = linear.tiles[0];
    const char* x = tile.x + b * tile.block_bytes;
    switch (linear.plan.rows) {
      case 1:
        return SparseTile<D, 1>::template run<Inside>(rows, bitmap, step, x, features, fetch, bytes_per_word, tile.kept,
                                                      b == 0);
      case 2:
        return SparseTile<D, 2>::template run<Inside>(rows, bitmap, step, x, features, fetch, bytes_per_word, tile.kept,
                                                      b == 0);
      default:
        return SparseTile<D, 3>::template run<Inside>(rows, bitmap, step, x, features, fetch, bytes_per_word, tile.kept,
                                                      b == 0);
    }
  }

  template <bool Inside>
  static const char* spread(Reader<D>& row, const int32_t* bitmap, int64_t features, char* to, const char* fetch,
                            int64_t bytes_per_word) {
    Reader<D> reader = row;
    for (int64_t w = 0; kWord * w < features; ++w) {
      const uint32_t bits = static_cast<uint32_t>(bitmap[w]) & first_bits(features - kWord * w);
      char* word = to + w * kWord * kBytes<D>;
      _mm512_store_si512(word, reader.template spread<Inside>(bits));
      if constexpr (D == Dtype::f32) _mm512_store_si512(word + 64, reader.template spread<Inside>(bits >> 16));
      _mm_prefetch(fetch, _MM_HINT_T0);
      fetch += bytes_per_word;
    }
    row = reader;
    return fetch;
  }
};

template <Dtype D>
void outputs(const SparseLinearArgs& a, const LinearPlan& plan, Scratch scratch, int64_t begin, int64_t end) {
  Sparse<D> sparse(a, plan, scratch);
  int64_t o = begin;
  for (; o + kGroup <= end; o += kGroup) sparse.group(o, kGroup, end);
  for (; o < end; ++o) sparse.group(o, 1, end);
}

}  // namespace

void sparse_linear_outputs(const SparseLinearArgs& a, const LinearPlan& plan, Scratch scratch, int64_t begin,
                           int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return outputs<Dtype::f32>(a, plan, scratch, begin, end);
    case Dtype::bf16:
      return outputs<Dtype::bf16>(a, plan, scratch, begin, end);
    case Dtype::f16:
      return outputs<Dtype::f16>(a, plan, scratch, begin, end);
  }
}

}  // namespace personafast::avx512
