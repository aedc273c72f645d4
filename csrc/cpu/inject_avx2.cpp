// inject, 32 columns at a time. Multiply and add stay apart, so that every ISA and the torch reference give the same
// bits.

#include "avx2_columns.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

template <Dtype H, Dtype B>
void rows(const InjectArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kHiddenBytes = H == Dtype::f32 ? 4 : 2;
  constexpr int64_t kBankBytes = B == Dtype::f32 ? 4 : 2;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = a.slots[t];
    if (slot < 0) continue;
    char* hidden = static_cast<char*>(a.hidden) + t * a.hidden_stride * kHiddenBytes;
    const char* bank = static_cast<const char*>(a.bank) + slot * a.bank_stride * kBankBytes;
    const Columns scale = all(a.scale ? a.scale[t] : 1.0f);
    for_columns(a.width, [&](int64_t i, int64_t n) {
      store<H>(hidden, i, n, load<H>(hidden, i, n) + load<B>(bank, i, n) * scale);
    });
  }
}

}  // namespace

void inject_rows(const InjectArgs& a, int64_t begin, int64_t end) {
  const bool wide = a.bank_dtype == Dtype::f32;
  switch (a.hidden_dtype) {
    case Dtype::f32:
      return rows<Dtype::f32, Dtype::f32>(a, begin, end);
    case Dtype::bf16:
      return wide ? rows<Dtype::bf16, Dtype::f32>(a, begin, end) : rows<Dtype::bf16, Dtype::bf16>(a, begin, end);
    case Dtype::f16:
      return wide ? rows<Dtype::f16, Dtype::f32>(a, begin, end) : rows<Dtype::f16, Dtype::f16>(a, begin, end);
  }
}

}  // namespace personafast::avx2
