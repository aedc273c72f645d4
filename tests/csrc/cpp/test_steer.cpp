#include "personafast/steer.h"

#include "steered.h"

using namespace check;

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const int64_t rows = large ? random.between(900, 1100) : random.between(0, 9);
  const int64_t width = large ? random.between(150, 250) : random.size(200);
  const int64_t count = random.between(0, 5);
  const Dtype dtype = random.dtype();

  Tensor hidden(random, dtype, {rows, width}, Tensor::gapped(random, {rows, width}));
  Tensor directions(random, random.chance(50) ? Dtype::f32 : dtype, {count, width},
                    Tensor::gapped(random, {count, width}));
  Buffer<int32_t> slots(random, rows, -1);
  Buffer<int8_t> mode(random, count, 0);
  Buffer<float> params(random, 2 * count, 0);
  Buffer<float> scale(random, rows, 0);
  const bool scaled = random.chance(70);
  hidden.fill(random);
  directions.fill(random);
  fill_slots(random, slots, count);
  for (int64_t s = 0; s < count; ++s) {
    mode[s] = static_cast<int8_t>(random.between(0, personafast::kSteerModes - 1));
    params[2 * s] = static_cast<float>(random.uniform(-2, 2));
    params[2 * s + 1] = static_cast<float>(random.uniform(-2, 2));
    if (static_cast<SteerMode>(mode[s]) == SteerMode::clamp && random.chance(30)) params[2 * s] = -HUGE_VALF;
    if (static_cast<SteerMode>(mode[s]) == SteerMode::clamp && random.chance(30)) params[2 * s + 1] = HUGE_VALF;
    if (random.chance(10)) params[2 * s] = random.pick({0.0f, 1.0f});
    const bool zero = random.chance(10);
    for (int64_t i = 0; zero && i < width; ++i) directions.set(0, s, i);
  }
  for (int64_t t = 0; t < rows; ++t) {
    scale[t] = random.chance(20) ? random.pick({0.0f, 1.0f}) : static_cast<float>(random.uniform(-2, 2));
    if (random.chance(90)) continue;
    // Rows of zeros, and rows that an addition of the direction takes to zero.
    const int64_t s = slots[t];
    const bool zero = s < 0 || random.chance(50);
    for (int64_t i = 0; i < width; ++i) hidden.set(zero ? 0 : -directions.get(s, i), t, i);
  }
  int64_t wrong = spoil_slots(random, slots, count);
  if (wrong < 0 && count > 0 && random.chance(5)) {
    const int64_t unknown = random.between(0, count - 1);
    mode[unknown] = random.pick<int8_t>({-1, personafast::kSteerModes, INT8_MIN, INT8_MAX});
    for (int64_t t = rows - 1; t >= 0; --t) wrong = slots[t] == unknown ? t : wrong;
  }

  std::vector<Row> expected;
  for (int64_t t = 0; t < rows; ++t) {
    Row row;
    for (int64_t i = 0; i < width; ++i) row.expected.push_back(hidden.get(t, i));
    row.allowed.resize(row.expected.size());
    const int64_t s = slots[t];
    if (wrong < 0 && s >= 0) {
      std::vector<double> direction;
      for (int64_t i = 0; i < width; ++i) direction.push_back(directions.get(s, i));
      row = steer(row.expected, direction, static_cast<SteerMode>(mode[s]), params[2 * s], params[2 * s + 1],
                  scaled ? static_cast<double>(scale[t]) : 1, dtype);
    }
    expected.push_back(row);
  }

  const personafast::SteerArgs args = {hidden.data(),
                                       hidden.stride(0),
                                       dtype,
                                       directions.data(),
                                       directions.stride(0),
                                       directions.dtype(),
                                       slots.data(),
                                       mode.data(),
                                       params.data(),
                                       scaled ? scale.data() : nullptr,
                                       rows,
                                       width,
                                       count};
  const std::vector<unsigned char> start = hidden.bytes();
  const int64_t got = personafast::steer_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "steer returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < width; ++i) {
      const Row& row = expected[static_cast<size_t>(t)];
      const size_t k = static_cast<size_t>(i);
      require_close(hidden.get(t, i), row.expected[k], row.allowed[k], "hidden", t, i);
    }
  }
  hidden.require_untouched_gaps("hidden");

  const std::vector<unsigned char> before = hidden.bytes();
  hidden.restore(start);
  personafast::steer_cpu(args, 1);
  require(hidden.bytes() == before, "hidden depends on the number of threads");
}

int main(int argc, char** argv) { return run(argc, argv, 1000, one); }
