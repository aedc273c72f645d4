#pragma once

#include <stdint.h>

#include "personafast/dtype.h"

namespace personafast {

// What a slot does to a row h, with its direction d, u = d / |d|, a = scale[t] and the parameters p0, p1 of the slot.
// A coordinate along u is h.u. The last column says what leaves a row alone, beside a slot of -1 and a change of 0.
enum class SteerMode : int8_t {
  ablate = 0,           // h - a p0 (h.u) u                          d = 0
  clamp = 1,            // h + a (min(max(h.u, p0), p1) - h.u) u     d = 0
  norm_preserving = 2,  // m |h| / |m| with m = h + a p0 d           m = 0
  replace = 3,          // (1 - a) h + a p0 d
};

constexpr int kSteerModes = 4;

// hidden[t, :] is steered by slots[t], in place: sums in fp32, each element rounded once.
struct SteerArgs {
  void* hidden;           // [rows, width] of hidden_dtype
  int64_t hidden_stride;  // elements from one row to the next
  Dtype hidden_dtype;
  const void* directions;  // [directions_rows, width] of directions_dtype
  int64_t directions_stride;
  Dtype directions_dtype;  // hidden_dtype or f32
  const int32_t* slots;    // [rows]
  const int8_t* mode;      // [directions_rows], a SteerMode
  const float* params;     // [directions_rows, 2]
  const float* scale;      // [rows], or null for 1
  int64_t rows;
  int64_t width;
  int64_t directions_rows;
};

// Returns -1, or the first row whose slot is outside [-1, directions_rows), or else the first whose slot is of no known
// mode; then nothing has been written.
int64_t steer_cpu(const SteerArgs& args, int threads);

// See personafast/cuda.h.
int steer_cuda(const SteerArgs& args, void* stream);

}  // namespace personafast
