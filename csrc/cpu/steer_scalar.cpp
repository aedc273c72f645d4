// steer in plain C++: the kernel of machines without AVX2, and the shape of the two others.

#include "kernels.h"
#include "scalar_float.h"
#include "scalar_lane_sum.h"

namespace personafast::scalar {
namespace {

template <Dtype H, Dtype D>
SteerSums dots(const void* hidden, const void* direction, int64_t width) {
  const float hd = lane_sum(width, [&](int64_t i) { return load<H>(hidden, i) * load<D>(direction, i); });
  const float dd = lane_sum(width, [&](int64_t i) { return load<D>(direction, i) * load<D>(direction, i); });
  return {hd, dd, 0.0f, 0.0f};
}

template <Dtype H, Dtype D>
SteerSums squares(const void* hidden, const void* direction, int64_t width, float amount) {
  const float hh = lane_sum(width, [&](int64_t i) { return load<H>(hidden, i) * load<H>(hidden, i); });
  const float mm = lane_sum(width, [&](int64_t i) {
    const float moved = load<H>(hidden, i) + load<D>(direction, i) * amount;
    return moved * moved;
  });
  return {0.0f, 0.0f, hh, mm};
}

template <Dtype H, Dtype D>
void apply(void* hidden, const void* direction, int64_t width, SteerUpdate update) {
  for (int64_t i = 0; i < width; ++i) {
    const float moved = load<H>(hidden, i) * update.keep + load<D>(direction, i) * update.add;
    store<H>(hidden, i, moved * update.ratio);
  }
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
    apply<H, D>(hidden, direction, a.width, update);
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

}  // namespace personafast::scalar
