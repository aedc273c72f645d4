#pragma once

#include "check.h"
#include "personafast/steer.h"

namespace check {

using personafast::SteerMode;

// One row, steered in double, and how far off fp32 may be.
struct Row {
  std::vector<double> expected;
  std::vector<double> allowed;
};

inline Row steer(const std::vector<double>& h, const std::vector<double>& d, SteerMode mode, double p0, double p1,
                 double a, Dtype dtype) {
  const int64_t width = static_cast<int64_t>(h.size());
  double hd = 0, hd_size = 0, dd = 0, hh = 0;
  for (size_t i = 0; i < h.size(); ++i) {
    hd += h[i] * d[i];
    hd_size += fabs(h[i] * d[i]);
    dd += d[i] * d[i];
    hh += h[i] * h[i];
  }
  double keep = 1, add = a * p0, add_error = 0x1p-22 * fabs(add), ratio = 1, ratio_error = 0;
  if (mode == SteerMode::replace) {
    keep = 1 - a;
  } else if (mode == SteerMode::norm_preserving) {
    double mm = 0, mm_error = 0;
    for (size_t i = 0; i < h.size(); ++i) {
      const double m = h[i] + add * d[i];
      mm += m * m;
      mm_error += 0x1p-22 * fabs(m) * (fabs(h[i]) + fabs(add * d[i]));
    }
    if (mm == 0) {
      add = add_error = 0;
    } else {
      ratio = sqrt(hh / mm);
      ratio_error = ratio * (summing(width, mm) + mm_error) / mm;
    }
  } else if (dd == 0) {
    add = add_error = 0;
  } else {
    const double length = sqrt(dd);
    const double coordinate = hd / length;
    const double clipped = fmin(fmax(coordinate, p0), p1);
    const double amount = mode == SteerMode::ablate ? fabs(a * p0) : fabs(a);
    add = (mode == SteerMode::ablate ? -a * p0 * coordinate : a * (clipped - coordinate)) / length;
    const double size = fabs(coordinate) + (mode == SteerMode::clamp ? fabs(clipped) : 0);
    add_error = amount * (summing(width, hd_size) / dd + size / length * 0x1p-24 * static_cast<double>(width + 16));
  }
  Row row;
  for (size_t i = 0; i < h.size(); ++i) {
    const double moved = keep * h[i] + add * d[i];
    const double moved_error = add_error * fabs(d[i]) + 0x1p-22 * (fabs(keep * h[i]) + fabs(add * d[i]));
    const double result = moved * ratio;
    row.expected.push_back(result);
    row.allowed.push_back(rounding(dtype, result) + moved_error * ratio + fabs(moved) * ratio_error);
  }
  return row;
}

}  // namespace check
