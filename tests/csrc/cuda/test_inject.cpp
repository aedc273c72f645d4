#include "personafast/inject.h"

#include "check.h"
#include "emulated.h"

using namespace check;

// Multiply and add are rounded apart, so the result is known to the bit. A row of a wrong slot is left alone.
static void one(Random& random) {
  const int64_t rows = random.between(0, 5);
  const int64_t width = some_width(random);
  const int64_t bank_rows = random.between(0, 4);
  const Dtype dtype = random.dtype();
  Tensor hidden(random, dtype, {rows, width}, row_strides(random, rows, width));
  std::vector<int64_t> bank_strides = row_strides(random, bank_rows, width);
  if (random.chance(10)) bank_strides[0] = 0;  // one vector expanded
  Tensor bank(random, random.chance(50) ? Dtype::f32 : dtype, {bank_rows, width}, bank_strides);
  Buffer<int32_t> slots(random, rows, -1);
  Buffer<float> scale(random, rows, 0);
  const bool scaled = random.chance(70);
  const double most = random.chance(10) ? 0x1p-125 : 2;  // at times denormal numbers
  hidden.fill(random, -most, most);
  bank.fill(random, -most, most);
  fill_slots(random, slots, bank_rows);
  spoil_slots(random, slots, bank_rows);
  fill_scale(random, scale, slots, bank_rows);

  std::vector<uint32_t> expected;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < width; ++i) {
      if (slots[t] < 0 || slots[t] >= bank_rows) {
        expected.push_back(hidden.pattern(t, i));
        continue;
      }
      const float added = static_cast<float>(bank.get(slots[t], i)) * (scaled ? scale[t] : 1.0f);
      expected.push_back(hidden.rounded(static_cast<float>(hidden.get(t, i)) + added));
    }
  }

  const personafast::InjectArgs args = {hidden.data(),  hidden.stride(0),
                                        dtype,          bank.data(),
                                        bank.stride(0), bank.dtype(),
                                        slots.data(),   scaled ? scale.data() : nullptr,
                                        rows,           width,
                                        bank_rows};
  require_launched(personafast::inject_cuda(args, nullptr));
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < width; ++i) {
      require(hidden.pattern(t, i) == expected[static_cast<size_t>(t * width + i)],
              "hidden[%lld, %lld] of %s is %.9g, which is not the bits expected", static_cast<long long>(t),
              static_cast<long long>(i), dtype_name(dtype), hidden.get(t, i));
    }
  }
  hidden.require_untouched_gaps("hidden");
}

int main(int argc, char** argv) { return run_emulated(argc, argv, 1000, one); }
