#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

// Dot products of groups of weight rows with the rows of a batch: the core of every linear layer.
//
// A weight comes from memory once, in address order, and meets all rows of the batch while it is in L1: features are
// taken in blocks for which the batch's share of x stays there too, and while one group is multiplied the next is
// fetched. Whatever the batch, the masks and the source of the weights, a row and an output are summed in one order:
// lane by lane over a block of kBlock features, the lanes in pairs, the blocks one after the other.
namespace personafast::avx512 {
namespace {

// Weight rows of a group, features of a block and of a word.
constexpr int kGroup = static_cast<int>(kOutputGroup);
constexpr int64_t kBlock = 1024;
constexpr int64_t kWord = 32;

template <Dtype D>
constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;

// x is packed as what the multiply-adds take: bf16 as it is, all else as fp32.
template <Dtype D>
constexpr int64_t kPackedBytes = D == Dtype::bf16 ? 2 : 4;

inline int64_t words_of(int64_t features) { return (features + kWord - 1) / kWord; }

inline __mmask32 first_bits(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1u; }

template <Dtype D>
__m512 load16(const void* base, int64_t i, __mmask16 m) {
  if constexpr (D == Dtype::f32) {
    return _mm512_maskz_loadu_ps(m, static_cast<const float*>(base) + i);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + i);
    if constexpr (D == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// Four values, of which the first `count` are wanted.
template <Dtype D>
__m128 load4(const void* base, int64_t i, int count) {
  const __mmask8 m = static_cast<__mmask8>((1u << count) - 1u);
  if constexpr (D == Dtype::f32) {
    return _mm_maskz_loadu_ps(m, static_cast<const float*>(base) + i);
  } else {
    const __m128i half = _mm_maskz_loadu_epi16(m, static_cast<const uint16_t*>(base) + i);
    if constexpr (D == Dtype::f16) return _mm_cvtph_ps(half);
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
  }
}

// Rounds to nearest even; in integers for bf16, since cvtneps_pbh would flush denormals.
template <Dtype D>
void store4(void* base, int64_t i, __m128 value, int count) {
  const __mmask8 m = static_cast<__mmask8>((1u << count) - 1u);
  if constexpr (D == Dtype::f32) {
    _mm_mask_storeu_ps(static_cast<float*>(base) + i, m, value);
  } else {
    __m128i half;
    if constexpr (D == Dtype::f16) {
      half = _mm_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m128i bits = _mm_castps_si128(value);
      const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
      const __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
      const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x400000));
      const __mmask8 nan = _mm_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      half = _mm_cvtepi32_epi16(_mm_srli_epi32(_mm_mask_mov_epi32(rounded, nan, quiet), 16));
    }
    _mm_mask_storeu_epi16(static_cast<uint16_t*>(base) + i, m, half);
  }
}

// Lane r is the sum of the lanes of the r-th argument.
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Memory that will be needed next is fetched a few lines a word between the multiply-adds, kQuarters runs of words in
// address order, `jump` bytes apart. Four streams at a time, one a row of the next group, would get a quarter less out
// of the memory.
constexpr int64_t kQuarters = 4;

// The rows of x that one tile multiplies, interleaved: word w of row t at (w * rows + t) * 32, zeros beyond the last
// feature, so that a tile reads one stream.
template <Dtype D>
void pack_rows(char* to, const void* x, int64_t stride, const int64_t* rows, int64_t count, int64_t features) {
  const int64_t words = words_of(features);
  for (int64_t t = 0; t < count; ++t) {
    const char* from = static_cast<const char*>(x) + rows[t] * stride * kBytes<D>;
    for (int64_t w = 0; w < words; ++w) {
      const __mmask32 exist = first_bits(features - kWord * w);
      char* word = to + (w * count + t) * kWord * kPackedBytes<D>;
      if constexpr (D == Dtype::bf16) {
        _mm512_store_si512(word, _mm512_maskz_loadu_epi16(exist, from + 2 * kWord * w));
      } else {
        const __mmask16 high = static_cast<__mmask16>(exist >> 16);
        _mm512_store_ps(word, load16<D>(from, kWord * w, static_cast<__mmask16>(exist)));
        _mm512_store_ps(word + 64, load16<D>(from, kWord * w + 16, high));
      }
    }
  }
}

// A tile: kGroup weight rows, `step` elements apart (0: one row four times over, for the last few rows of a matrix), by
// T packed rows of x, under no mask, one for all of them or one each.
template <Dtype D, int T, Keep K, bool Soft>
struct Tile {
  static constexpr int kParts = D == Dtype::bf16 ? 1 : 2;

  const char* weight;
  int64_t step;
  const char* x;
  const int32_t* mask;
  const int32_t* other;  // of the second row, with Keep::each
  int64_t mask_step;     // words from the mask of a weight row to that of the next
  __m512 kept[T][kGroup];
  __m512 dropped[Soft ? T : 1][kGroup];

  // Features 32 w to 32 w + 31 of the block, of which `exist` do.
  template <bool Whole>
  __attribute__((always_inline)) void word(int64_t w, __mmask32 exist) {
    const char* packed = x + w * T * kWord * kPackedBytes<D>;
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      __m512i weights[kGroup];
#pragma GCC unroll 4
      for (int r = 0; r < kGroup; ++r) {
        const char* row = weight + r * step * kBytes<D>;
        if constexpr (D == Dtype::bf16) {
          weights[r] =
              Whole ? _mm512_loadu_si512(row + 2 * kWord * w) : _mm512_maskz_loadu_epi16(exist, row + 2 * kWord * w);
        } else {
          const __mmask16 m = Whole ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>(exist >> (16 * part));
          weights[r] = _mm512_castps_si512(load16<D>(row, kWord * w + 16 * part, m));
        }
        if constexpr (K == Keep::shared && !Soft) weights[r] = mask_out(mask[r * mask_step + w], part, weights[r]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512i xt = _mm512_load_si512(packed + (t * kParts + part) * 64);
#pragma GCC unroll 4
        for (int r = 0; r < kGroup; ++r) {
          if constexpr (K == Keep::all || (K == Keep::shared && !Soft)) {
            multiply(kept[t][r], weights[r], xt);
          } else {
            const int32_t bits = (K == Keep::each && t == 1 ? other : mask)[r * mask_step + w];
            multiply(kept[t][r], mask_out(bits, part, weights[r]), xt);
            if constexpr (Soft) multiply(dropped[t][r], mask_out(~bits, part, weights[r]), xt);
          }
        }
      }
    }
  }

  static __attribute__((always_inline)) __m512i mask_out(int32_t bits, int part, __m512i weights) {
    const uint32_t keep = static_cast<uint32_t>(bits);
    if constexpr (D == Dtype::bf16) return _mm512_maskz_mov_epi16(keep, weights);
    return _mm512_maskz_mov_epi32(static_cast<__mmask16>(keep >> (16 * part)), weights);
  }

  static __attribute__((always_inline)) void multiply(__m512& sum, __m512i weights, __m512i x) {
    if constexpr (D == Dtype::bf16) {
      sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
    } else {
      sum = _mm512_fmadd_ps(_mm512_castsi512_ps(weights), _mm512_castsi512_ps(x), sum);
    }
  }

  static void add(float* to, const __m512* sums, bool first) {
    const __m128 block = sum_lanes(sums[0], sums[1], sums[2], sums[3]);
    _mm_storeu_ps(to, first ? block : _mm_add_ps(_mm_loadu_ps(to), block));
  }

  // One block: adds to kept_sums[t * kGroup + r], or writes there if the block is the first of its row; likewise the
  // sums of the weights that the masks drop. The arguments are single values for a reason: a struct of them would be
  // loaded with wider loads than the stores that filled it, which waits until those reach the cache, and with them
  // everything before: no two tiles would wait for the memory at the same time.
  static void run(const char* weight, int64_t step, const char* x, const int32_t* mask, const int32_t* other,
                  int64_t mask_step, int64_t features, const char* fetch, int64_t jump, int64_t advance,
                  int64_t per_word, float* kept_sums, float* dropped_sums, int64_t first) {
    Tile tile = {weight, step, x, mask, other, mask_step, {}, {}};
    const int64_t whole = features / kWord;
    int64_t w = 0;
    for (int64_t quarter = 0; quarter < kQuarters; ++quarter) {
      const char* line = fetch + quarter * jump;
      for (const int64_t end = whole * (quarter + 1) / kQuarters; w < end; ++w) {
        if (per_word > 0) {
          _mm_prefetch(line, _MM_HINT_T0);
          if (per_word > 1) _mm_prefetch(line + 64, _MM_HINT_T0);
          for (int64_t more = 2; more < per_word; ++more) _mm_prefetch(line + 64 * more, _MM_HINT_T0);
          line += advance;
        }
        tile.template word<true>(w, 0xffffffffu);
      }
    }
    const int64_t left = features - kWord * whole;
    if (left > 0) tile.template word<false>(whole, first_bits(left));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      add(kept_sums + kGroup * t, tile.kept[t], first);
      if constexpr (Soft) add(dropped_sums + kGroup * t, tile.dropped[t], first);
    }
  }
};

using RunTile = decltype(&Tile<Dtype::f32, 1, Keep::all, false>::run);

// Sums of kept and of dropped weights together leave registers for kSoftTileRows only.
template <Dtype D, bool Soft>
RunTile tile_of(Keep keep, int64_t rows) {
  if (keep == Keep::each) return &Tile<D, 2, Keep::each, Soft>::run;
  const bool all = keep == Keep::all;
  switch (rows) {
    case 1:
      return all ? &Tile<D, 1, Keep::all, false>::run : &Tile<D, 1, Keep::shared, Soft>::run;
    case 2:
      return all ? &Tile<D, 2, Keep::all, false>::run : &Tile<D, 2, Keep::shared, Soft>::run;
    case 3:
      return all ? &Tile<D, 3, Keep::all, false>::run : &Tile<D, 3, Keep::shared, Soft>::run;
    case 4:
      return all ? &Tile<D, 4, Keep::all, false>::run : &Tile<D, 4, Keep::shared, false>::run;
    case 5:
      return all ? &Tile<D, 5, Keep::all, false>::run : &Tile<D, 5, Keep::shared, false>::run;
    default:
      return all ? &Tile<D, 6, Keep::all, false>::run : &Tile<D, 6, Keep::shared, false>::run;
  }
}

// From so many rows on, multiplying takes long enough to fetch the next block of the same weight rows just before it is
// used, while x fills most of L1. With fewer rows, the next group is fetched in address order, which memory serves
// best.
constexpr int64_t kNearRows = 8;

// A batch of rows of x, packed, and the sums of the group in hand.
struct LinearArgs {
  const void* x;
  int64_t x_stride;
  const void* weight;  // unless the blocks come from elsewhere
  int64_t weight_stride;
  const int32_t* masks;
  int64_t outputs;
  int64_t features;
};

template <Dtype D, bool Soft>
struct Linear {
  struct Rows {
    RunTile run;
    const char* x;
    int64_t block_bytes;  // of x
    const int32_t* masks[2];
    float* kept;
    float* dropped;
  };

  const LinearArgs a;
  const LinearPlan& plan;
  const int64_t words = words_of(a.features);
  const int64_t blocks = (a.features + kBlock - 1) / kBlock;
  const bool near = plan.rows >= kNearRows;
  // A view of some columns of a wider matrix would have the columns in between fetched too.
  const bool fetches = a.weight_stride <= 2 * a.features;
  Rows tiles[kPlanRows];
  alignas(64) float kept[kPlanRows * kGroup] = {};
  alignas(64) float dropped[kPlanRows * kGroup] = {};

  Linear(const LinearArgs& args, const LinearPlan& rows, Scratch scratch) : a(args), plan(rows) {
    char* to = static_cast<char*>(scratch.at);
    int64_t first = 0;
    for (int64_t j = 0; j < plan.count; ++j) {
      const LinearTile& tile = plan.tiles[j];
      if (!scratch.packed) pack_rows<D>(to, a.x, a.x_stride, tile.rows, tile.count, a.features);
      const auto mask = [&](int k) {
        return tile.keep == Keep::all ? nullptr : a.masks + tile.slots[k] * a.outputs * words;
      };
      tiles[j] = {tile_of<D, Soft>(tile.keep, tile.count),
                  to,
                  kBlock * tile.count * kPackedBytes<D>,
                  {mask(0), mask(1)},
                  kept + kGroup * first,
                  dropped + kGroup * first};
      to += tile.count * words * kWord * kPackedBytes<D>;
      first += tile.count;
    }
  }

  // Sums of outputs o to o + count - 1, in kept[row of the plan * kGroup + output]; `next` says whether the group after
  // it is of this thread too.
  void group(int64_t o, int count, bool next) {
    const int64_t step = count == kGroup ? a.weight_stride : 0;
    const int64_t mask_step = count == kGroup ? words : 0;
    const char* weight = static_cast<const char*>(a.weight) + o * a.weight_stride * kBytes<D>;
    const char* after = weight + kGroup * a.weight_stride * kBytes<D>;
    for (int64_t b = 0; b < blocks; ++b) {
      const bool more = near && b + 1 < blocks;
      const char* fetch = more ? weight + kBlock * kBytes<D> : after;
      if (!near) fetch += b * kBlock * kGroup * kBytes<D>;
      block(b, weight, step, o, mask_step, fetches && (next || more) ? fetch : nullptr, next);
      weight += kBlock * kBytes<D>;
    }
  }

  // Block b of the features of the outputs from o on; `next` says whether their successors' masks are wanted. From
  // `fetch` on, unless it is null, lies what will be needed: the group's next block, or a block's worth of the next
  // group in address order. Each tile fetches its share of the lines of every word.
  void block(int64_t b, const char* weight, int64_t step, int64_t o, int64_t mask_step, const char* fetch, bool next) {
    constexpr int64_t kLines = kGroup * kWord * kBytes<D> / 64;
    const int64_t left = a.features - b * kBlock;
    const int64_t features = left < kBlock ? left : kBlock;
    const int64_t quarter = features / kWord / kQuarters * kLines * 64;
    for (int64_t j = 0; j < plan.count; ++j) {
      const Rows& rows = tiles[j];
      const int32_t* masks[2] = {nullptr, nullptr};
      for (int k = 0; k < 2 && rows.masks[0]; ++k) {
        masks[k] = rows.masks[k] + o * words + b * (kBlock / kWord);
        if (next && (k == 0 || rows.masks[1] != rows.masks[0])) fetch_masks(rows.masks[k] + (o + kGroup) * words, b);
      }
      const int64_t first = kLines * j / plan.count;
      const int64_t lines = fetch == nullptr ? 0 : kLines * (j + 1) / plan.count - first;
      // A quarter of the next block is a row of it, of which the tiles fetch one part after the other; of the next
      // group it is what follows the quarter before, and the tiles fetch neighbouring lines.
      const char* mine = fetch == nullptr ? nullptr : fetch + (near ? quarter * first / kLines : 64 * first);
      rows.run(weight, step, rows.x + b * rows.block_bytes, masks[0], masks[1], mask_step, features, mine,
               near ? a.weight_stride * kBytes<D> : quarter, 64 * (near ? lines : kLines), lines, rows.kept,
               rows.dropped, b == 0);
    }
  }

  // A block's share of the masks of a group, which stand one behind the other.
  static void fetch_masks(const int32_t* group, int64_t b) {
    constexpr int64_t kShare = kGroup * kBlock / kWord;
    for (int64_t word = 0; word < kShare; word += 16) _mm_prefetch(group + b * kShare + word, _MM_HINT_T0);
  }
};

}  // namespace
}  // namespace personafast::avx512
