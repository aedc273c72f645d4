#include "emulated.h"
#include "steered.h"

using namespace check;

// A row whose slot is out of range or of no known mode is left alone.
static void one(Random& random) {
  const int64_t rows = random.between(0, 4);
  const int64_t width = some_width(random);
  const int64_t count = random.between(0, 5);
  const Dtype dtype = random.dtype();
  Tensor hidden(random, dtype, {rows, width}, row_strides(random, rows, width));
  Tensor directions(random, random.chance(50) ? Dtype::f32 : dtype, {count, width}, row_strides(random, count, width));
  Buffer<int32_t> slots(random, rows, -1);
  Buffer<int8_t> mode(random, count, 0);
  Buffer<float> params(random, 2 * count, 0);
  Buffer<float> scale(random, rows, 0);
  const bool scaled = random.chance(70);
  hidden.fill(random);
  directions.fill(random);
  fill_slots(random, slots, count);
  spoil_slots(random, slots, count);
  for (int64_t s = 0; s < count; ++s) {
    mode[s] = static_cast<int8_t>(random.between(0, personafast::kSteerModes - 1));
    if (random.chance(5)) mode[s] = random.pick<int8_t>({-1, personafast::kSteerModes, INT8_MIN, INT8_MAX});
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
    const bool zero = s < 0 || s >= count || random.chance(50);
    for (int64_t i = 0; i < width; ++i) hidden.set(zero ? 0 : -directions.get(s, i), t, i);
  }

  std::vector<Row> expected;
  for (int64_t t = 0; t < rows; ++t) {
    Row row;
    for (int64_t i = 0; i < width; ++i) row.expected.push_back(hidden.get(t, i));
    row.allowed.resize(row.expected.size());
    const int64_t s = slots[t];
    if (s >= 0 && s < count && mode[s] >= 0 && mode[s] < personafast::kSteerModes) {
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
  require_launched(personafast::steer_cuda(args, nullptr));
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
  emulator::schedule ^= 1;
  emulator::multiprocessors = 132 - emulator::multiprocessors;
  require_launched(personafast::steer_cuda(args, nullptr));
  require(hidden.bytes() == before, "hidden depends on the order of threads or on the device");
}

int main(int argc, char** argv) { return run_emulated(argc, argv, 1000, one); }
