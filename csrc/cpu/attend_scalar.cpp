// attend in plain C++: the kernel of machines without AVX2, and the shape of the two others.

#include "kernels.h"
#include "scalar_float.h"
#include "scalar_math.h"

namespace personafast::scalar {
namespace {

template <Dtype D>
constexpr int64_t kBytes = D == Dtype::f32 ? 4 : 2;

template <Dtype D>
void scores(const AttendArgs& a, const AttendBlock& b) {
  for (int64_t j = 0; j < b.count; ++j) {
    const char* key = static_cast<const char*>(b.key) + j * a.key_stride_n * kBytes<D>;
    for (int64_t r = 0; r < b.rows; ++r) {
      float sum = 0.0f;
      for (int64_t i = 0; i < a.width; ++i) sum += load<D>(b.queries[r], i) * load<D>(key, i);
      b.scores[r * kAttendKeys + j] = sum;
    }
  }
}

template <Dtype D>
void weights(const AttendArgs& a, const AttendBlock& b) {
  const float least = -__builtin_inff();
  for (int64_t r = 0; r < b.rows; ++r) {
    float* row = b.scores + r * kAttendKeys;
    float most = b.most[r];
    for (int64_t j = 0; j < b.count; ++j) {
      row[j] *= a.scale;
      if (a.mask != nullptr) {
        if (a.mask_adds) {
          row[j] += load<D>(b.masks[r], b.first + j);
        } else if (static_cast<const uint8_t*>(b.masks[r])[b.first + j] == 0) {
          row[j] = least;
        }
      }
      if (row[j] > most) most = row[j];
    }
    const float shift = most == least ? 0.0f : most;
    b.keep[r] = exp_ps(b.most[r] - shift);
    b.most[r] = most;
    float sum = 0.0f;
    for (int64_t j = 0; j < b.count; ++j) {
      row[j] = exp_ps(row[j] - shift);
      sum += row[j];
    }
    b.total[r] = b.total[r] * b.keep[r] + sum;
  }
}

template <Dtype D>
void values(const AttendArgs& a, const AttendBlock& b) {
  for (int64_t r = 0; r < b.rows; ++r) {
    float* sums = b.sums + r * b.padded;
    for (int64_t i = 0; i < a.width; ++i) sums[i] *= b.keep[r];
    for (int64_t j = 0; j < b.count; ++j) {
      const float weight = b.scores[r * kAttendKeys + j];
      const char* value = static_cast<const char*>(b.value) + j * a.value_stride_n * kBytes<D>;
      for (int64_t i = 0; i < a.width; ++i) sums[i] += weight * load<D>(value, i);
    }
  }
}

template <Dtype D>
void quotients(const AttendArgs& a, const AttendBlock& b) {
  for (int64_t r = 0; r < b.rows; ++r) {
    const float part = b.total[r] == 0.0f ? 0.0f : 1.0f / b.total[r];
    for (int64_t i = 0; i < a.width; ++i) store<D>(b.out[r], i, b.sums[r * b.padded + i] * part);
  }
}

template <Dtype D>
void block(const AttendArgs& a, const AttendBlock& b) {
  scores<D>(a, b);
  weights<D>(a, b);
  values<D>(a, b);
  if (b.last) quotients<D>(a, b);
}

}  // namespace

void attend_block(const AttendArgs& a, const AttendBlock& b) {
  switch (a.dtype) {
    case Dtype::f32:
      return block<Dtype::f32>(a, b);
    case Dtype::bf16:
      return block<Dtype::bf16>(a, b);
    case Dtype::f16:
      return block<Dtype::f16>(a, b);
  }
}

}  // namespace personafast::scalar
