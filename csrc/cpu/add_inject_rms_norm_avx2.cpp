// add_inject_rms_norm, 32 columns at a time. A first pass over a row adds and sums squares, a second, with the row in
// L1, scales. Every ISA gives the same bits.

#include "avx2_columns.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

// The sum of the squares of residual_out as it has been stored.
template <Dtype D, Dtype B, bool Inject>
float add(void* residual_out, const void* update, const void* residual, const void* bank, float scale, int64_t width) {
  const Columns scales = all(scale);
  Columns squares = all(0.0f);
  for_columns(width, [&](int64_t i, int64_t n) {
    Columns sum = load<D>(update, i, n) + load<D>(residual, i, n);
    if constexpr (Inject) sum = sum + load<B>(bank, i, n) * scales;
    const Columns stored = store<D>(residual_out, i, n, sum);
    squares = squares + stored * stored;
  });
  return total(squares);
}

// Memory would idle while a row is scaled from L1: the next inputs, if there are any, are fetched meanwhile.
template <Dtype D, Dtype W>
void norm(void* normed, const void* residual_out, const void* weight, float inverse, int64_t width,
          const void* next_update, const void* next_residual) {
  const Columns inverses = all(inverse);
  for_columns(width, [&](int64_t i, int64_t n) {
    if (next_update) {
      prefetch<D>(next_update, i);
      prefetch<D>(next_residual, i);
    }
    store<D>(normed, i, n, load<D>(residual_out, i, n) * inverses * load<W>(weight, i, n));
  });
}

template <Dtype D, Dtype B, Dtype W>
void rows(const AddInjectRmsNormArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;
  constexpr int64_t kBankBytes = B == Dtype::f32 ? 4 : 2;
  for (int64_t t = begin; t < end; ++t) {
    const char* update = static_cast<const char*>(a.update) + t * a.update_stride * kBytes;
    const char* residual = static_cast<const char*>(a.residual) + t * a.residual_stride * kBytes;
    char* residual_out = static_cast<char*>(a.residual_out) + t * a.width * kBytes;
    char* normed = static_cast<char*>(a.normed) + t * a.width * kBytes;
    const int64_t slot = a.slots[t];
    float squares;
    if (slot < 0) {
      squares = add<D, B, false>(residual_out, update, residual, nullptr, 0.0f, a.width);
    } else {
      const char* bank = static_cast<const char*>(a.bank) + slot * a.bank_stride * kBankBytes;
      squares = add<D, B, true>(residual_out, update, residual, bank, a.scale ? a.scale[t] : 1.0f, a.width);
    }
    const float inverse = 1.0f / __builtin_sqrtf(squares / static_cast<float>(a.width) + a.eps);
    const bool more = t + 1 < end;
    norm<D, W>(normed, residual_out, a.weight, inverse, a.width, more ? update + a.update_stride * kBytes : nullptr,
               more ? residual + a.residual_stride * kBytes : nullptr);
  }
}

template <Dtype D>
void rows_of(const AddInjectRmsNormArgs& a, int64_t begin, int64_t end) {
  const bool wide_bank = a.bank_dtype == Dtype::f32;
  if (a.weight_dtype == Dtype::f32) {
    return wide_bank ? rows<D, Dtype::f32, Dtype::f32>(a, begin, end) : rows<D, D, Dtype::f32>(a, begin, end);
  }
  return wide_bank ? rows<D, Dtype::f32, D>(a, begin, end) : rows<D, D, D>(a, begin, end);
}

}  // namespace

void add_inject_rms_norm_rows(const AddInjectRmsNormArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return rows_of<Dtype::f32>(a, begin, end);
    case Dtype::bf16:
      return rows_of<Dtype::bf16>(a, begin, end);
    case Dtype::f16:
      return rows_of<Dtype::f16>(a, begin, end);
  }
}

}  // namespace personafast::avx2
