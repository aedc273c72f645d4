#pragma once

// What the tests of emulated kernels share beside check.h.

#include "check.h"
#include "emulator.h"

namespace check {

// As check::run; every case has another order of threads, and at times enough multiprocessors that a launch of its size
// is one wave.
inline int run_emulated(int argc, char** argv, long long cases, void (*one)(Random&)) {
  static void (*chosen)(Random&);
  chosen = one;
  emulator::on_error = print_case;
  return run(argc, argv, cases, [](Random& random) {
    emulator::schedule = random.pick<uint64_t>({0, 1, random.bits() | 2});
    emulator::multiprocessors = static_cast<int>(random.pick<int64_t>({0, 1, 132}));
    chosen(random);
  });
}

inline void require_launched(int error) { require(error == 0, "the launch failed with error %d", error); }

// Dense rows, rows that begin where accesses of 16 bytes can, and rows with any gap.
inline std::vector<int64_t> row_strides(Random& random, int64_t rows, int64_t width) {
  std::vector<int64_t> strides = Tensor::dense({rows, width});
  if (random.chance(40)) strides[0] = (width + 7) / 8 * 8 + 8 * random.between(0, 4);
  if (random.chance(20)) strides[0] += random.between(1, 9);
  return strides;
}

// Mostly small, and at times about what a block keeps in registers: 2048 columns one by one, 8192 of fp32 and 16384 of
// 16 bit in accesses of 16 bytes.
inline int64_t some_width(Random& random) {
  if (random.chance(40)) return 16 * random.between(1, 25);
  if (random.chance(70)) return random.size(400);
  const int64_t most = random.pick<int64_t>({2048, 2048, 8192, 16384});
  return random.chance(70) ? most + random.pick<int64_t>({0, 1, 4, 8}) : random.between(most - 200, most + 200);
}

// One number a row, NaN where the slot says that nothing is to be done.
inline void fill_scale(Random& random, Buffer<float>& scale, Buffer<int32_t>& slots, int64_t count) {
  for (int64_t t = 0; t < scale.size(); ++t) {
    scale[t] = slots[t] < 0 || slots[t] >= count ? NAN : static_cast<float>(random.uniform(-3, 3));
  }
}

}  // namespace check
