// add_inject_rms_norm in plain C++: the kernel of machines without AVX2, and the shape of the two others.

#include "kernels.h"
#include "scalar_float.h"
#include "scalar_lane_sum.h"

namespace personafast::scalar {
namespace {

// The sum of the squares of residual_out as it has been stored.
template <Dtype D, Dtype B, bool Inject>
float add(void* residual_out, const void* update, const void* residual, const void* bank, float scale, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    float sum = load<D>(update, i) + load<D>(residual, i);
    if constexpr (Inject) sum += load<B>(bank, i) * scale;
    store<D>(residual_out, i, sum);
  }
  return lane_sum(width, [&](int64_t i) { return load<D>(residual_out, i) * load<D>(residual_out, i); });
}

template <Dtype D, Dtype W>
void norm(void* normed, const void* residual_out, const void* weight, float inverse, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    store<D>(normed, i, load<D>(residual_out, i) * inverse * load<W>(weight, i));
  }
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
    norm<D, W>(normed, residual_out, a.weight, inverse, a.width);
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

}  // namespace personafast::scalar
