#include "personafast/steer.h"

#include <math.h>

#include "host.h"

namespace personafast {
namespace {

// The first row whose slot is of an unknown mode, or -1.
int64_t first_wrong_mode(const SteerArgs& args) {
  for (int64_t t = 0; t < args.rows; ++t) {
    if (args.slots[t] < 0) continue;
    const int8_t mode = args.mode[args.slots[t]];
    if (mode < 0 || mode >= kSteerModes) return t;
  }
  return -1;
}

// min(max(value, low), high), NaN if any of them is.
float clip(float value, float low, float high) {
  const float raised = value >= low ? value : value != value ? value : low;
  return raised > high || high != high ? high : raised;
}

}  // namespace

SteerUpdate steer_update(const SteerArgs& args, int64_t t, SteerSums sums) {
  const SteerUpdate alone = {1.0f, 0.0f, 1.0f};
  const int64_t slot = args.slots[t];
  const SteerMode mode = static_cast<SteerMode>(args.mode[slot]);
  const float p0 = args.params[2 * slot];
  const float p1 = args.params[2 * slot + 1];
  const float scale = args.scale ? args.scale[t] : 1.0f;
  const float amount = scale * p0;
  if (mode == SteerMode::replace) return {1.0f - scale, amount, 1.0f};
  if (mode == SteerMode::norm_preserving) {
    if (sums.mm == 0.0f) return alone;
    return {1.0f, amount, sqrtf(sums.hh / sums.mm)};
  }
  if (sums.dd == 0.0f) return alone;
  const float length = sqrtf(sums.dd);
  const float coordinate = sums.hd / length;
  const float change =
      mode == SteerMode::ablate ? -amount * coordinate : scale * (clip(coordinate, p0, p1) - coordinate);
  return {1.0f, change / length, 1.0f};
}

int64_t steer_cpu(const SteerArgs& args, int threads) {
  int64_t wrong = first_wrong_slot(args.slots, args.rows, args.directions_rows);
  if (wrong < 0) wrong = first_wrong_mode(args);
  if (wrong >= 0) return wrong;
  const Isa isa = isa_chosen();
  split(args.rows, args.rows * args.width, kWorkPerThread, threads,
        [&](int64_t begin, int64_t end) { PERSONAFAST_RUN(isa, steer_rows, args, begin, end); });
  return -1;
}

}  // namespace personafast
