// steer, 32 columns at a time. A first pass over a row sums, a second, with the row in L1, writes. Every ISA gives the
// same bits.

#include "avx2_columns.h"
#include "kernels.h"

namespace personafast::avx2 {
namespace {

template <Dtype H, Dtype D>
SteerSums dots(const void* hidden, const void* direction, int64_t width) {
  Columns hd = all(0.0f), dd = all(0.0f);
  for_columns(width, [&](int64_t i, int64_t n) {
    const Columns d = load<D>(direction, i, n);
    hd = hd + load<H>(hidden, i, n) * d;
    dd = dd + d * d;
  });
  return {total(hd), total(dd), 0.0f, 0.0f};
}

template <Dtype H, Dtype D>
SteerSums squares(const void* hidden, const void* direction, int64_t width, float amount) {
  const Columns add = all(amount);
  Columns hh = all(0.0f), mm = all(0.0f);
  for_columns(width, [&](int64_t i, int64_t n) {
    const Columns h = load<H>(hidden, i, n);
    const Columns m = h + load<D>(direction, i, n) * add;
    hh = hh + h * h;
    mm = mm + m * m;
  });
  return {0.0f, 0.0f, total(hh), total(mm)};
}

// Memory would idle while a row is written from L1: the next row, if there is one, is fetched meanwhile.
template <Dtype H, Dtype D>
void apply(void* hidden, const void* direction, int64_t width, SteerUpdate update, const void* next) {
  const Columns keep = all(update.keep), add = all(update.add), ratio = all(update.ratio);
  for_columns(width, [&](int64_t i, int64_t n) {
    if (next) prefetch<H>(next, i);
    const Columns moved = load<H>(hidden, i, n) * keep + load<D>(direction, i, n) * add;
    store<H>(hidden, i, n, moved * ratio);
  });
}

template <Dtype H, Dtype D>
void rows(const SteerArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kHiddenBytes = H == Dtype::f32 ? 4 : 2;
  constexpr int64_t kDirectionBytes = D == Dtype::f32 ? 4 : 2;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = a.slots[t];
    if (slot < 0) continue;
    char* hidden = static_cast<char*>(a.hidden) + t * a.hidden_stride * kHiddenBytes;
    const char* direction = static_cast<const char*>(a.directions) + slot * a.directions_stride * kDirectionBytes;
    SteerSums sums = {};
    switch (static_cast<SteerMode>(a.mode[slot])) {
      case SteerMode::ablate:
      case SteerMode::clamp:
        sums = dots<H, D>(hidden, direction, a.width);
        break;
      case SteerMode::norm_preserving:
        sums = squares<H, D>(hidden, direction, a.width, (a.scale ? a.scale[t] : 1.0f) * a.params[2 * slot]);
        break;
      case SteerMode::replace:
        break;
    }
    const SteerUpdate update = steer_update(a, t, sums);
    if (update.keep == 1.0f && update.add == 0.0f) continue;
    const bool more = t + 1 < end && a.slots[t + 1] >= 0;
    apply<H, D>(hidden, direction, a.width, update, more ? hidden + a.hidden_stride * kHiddenBytes : nullptr);
  }
}

}  // namespace

void steer_rows(const SteerArgs& a, int64_t begin, int64_t end) {
  const bool wide = a.directions_dtype == Dtype::f32;
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
