#pragma once

#include <stdint.h>
#include <string.h>

#include "personafast/dtype.h"

// Conversions of the scalar units alone. They have internal linkage, so no other unit can be given this copy or its
// own.
namespace personafast::scalar {
namespace {

float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
  if ((half & 0x7c00u) == 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x7fffffu));
  // The exponent is 112 too small; the product is exact, denormal halves included.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

// Round to nearest, ties to even.
uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;
  if (rest < 0x38800000u) {
    // Denormal half: adding 0.5 puts its last bit in the last place of the float, which rounds.
    const float shifted = bits_to_float(rest) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000u);
  }
  rest += 0xfffu + ((rest >> 13) & 1u);
  return sign | static_cast<uint16_t>((rest - 0x38000000u) >> 13);
}

template <Dtype D>
float load(const void* base, int64_t i) {
  if constexpr (D == Dtype::f32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  return D == Dtype::f16 ? half_to_float(bits) : bits_to_float(static_cast<uint32_t>(bits) << 16);
}

template <Dtype D>
void store(void* base, int64_t i, float value) {
  if constexpr (D == Dtype::f32) {
    static_cast<float*>(base)[i] = value;
  } else if constexpr (D == Dtype::f16) {
    static_cast<uint16_t*>(base)[i] = float_to_half(value);
  } else {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(rounded >> 16);
  }
}

// The sum of 32 partial sums, which it overwrites.
inline float pairwise(float* sums) {
  for (int width = 16; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

}  // namespace
}  // namespace personafast::scalar
