#pragma once

#include <stdint.h>

// Sums over a row in 32 lanes: column i is added to lane i % 32, then lane l + n to lane l for n = 16, 8, 4, 2, 1. The
// order is the same in every instruction set and depends on nothing but the width.
namespace personafast::scalar {
namespace {

// The sum of value(i) over all columns i, each asked for once and in order.
template <class Value>
float lane_sum(int64_t width, Value value) {
  float lanes[32] = {};
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    for (int64_t lane = 0; lane < 32; ++lane) lanes[lane] += value(i + lane);
  }
  for (int64_t lane = 0; i + lane < width; ++lane) lanes[lane] += value(i + lane);
  for (int64_t n = 16; n > 0; n /= 2) {
    for (int64_t lane = 0; lane < n; ++lane) lanes[lane] += lanes[lane + n];
  }
  return lanes[0];
}

}  // namespace
}  // namespace personafast::scalar
