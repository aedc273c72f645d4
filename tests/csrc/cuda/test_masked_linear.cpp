#include "personafast/masked_linear.h"

#include "check.h"
#include "emulated.h"

using namespace check;

// Random words, now and then all bits or none; those beyond the features are rubbish.
static int32_t mask_word(Random& random) {
  return static_cast<int32_t>(random.pick({0u, 0xffffffffu, static_cast<uint32_t>(random.bits())}));
}

// A row of a wrong slot takes the dense weight.
static void one(Random& random) {
  const bool wide = random.chance(15);  // more features than all warps hold at a time
  const int64_t rows = random.between(0, random.pick({1, 5, 9, wide ? 9 : 18}));
  const int64_t outputs = random.between(random.chance(80) ? 16 : 0, wide ? 17 : 40);
  int64_t features = random.size(random.pick<int64_t>({60, 300, 700}));
  if (wide) features = random.between(1000, 2800);
  if (random.chance(80)) features = (features + 7) / 8 * 8;
  if (random.chance(40)) features = (features + 127) / 128 * 128;
  const int64_t personas = random.between(0, random.pick({2, 4, 30}));
  const int64_t words = (features + 31) / 32;
  const Dtype dtype = random.dtype();

  std::vector<int64_t> x_strides = row_strides(random, rows, features);
  if (random.chance(10)) x_strides[0] = 0;  // one row expanded
  Tensor x(random, dtype, {rows, features}, x_strides);
  Tensor weight(random, dtype, {outputs, features}, row_strides(random, outputs, features));
  Tensor bias(random, dtype, {outputs}, {1});
  Tensor out(random, dtype, {rows, outputs}, Tensor::dense({rows, outputs}));
  Buffer<int32_t> masks(random, personas * outputs * words, 0);
  Buffer<int32_t> slots(random, rows, -1);
  Buffer<float> gamma(random, personas, 0);
  const bool soft = random.chance(40);
  const bool biased = random.chance(50);
  x.fill(random);
  weight.fill(random);
  bias.fill(random);
  for (int64_t i = 0; i < masks.size(); ++i) masks[i] = mask_word(random);
  for (int64_t p = 0; p < personas; ++p) gamma[p] = static_cast<float>(random.uniform(-2, 2));
  const bool slotless = random.chance(5);
  fill_slots(random, slots, slotless ? 0 : personas);
  if (!slotless) spoil_slots(random, slots, personas);
  // Weights at which tricks with numbers end: of no finite size, and so large that nothing can be added.
  const bool strange = outputs > 0 && features > 0 && random.chance(30);
  for (int64_t k = random.between(1, 4); strange && k > 0; --k) {
    const double large = dtype == Dtype::f16 ? 65504 : 0x1.fep126;
    weight.set(random.pick({HUGE_VAL, -HUGE_VAL, static_cast<double>(NAN), large, -large, 0.0, 0x1p-126}),
               random.between(0, outputs - 1), random.between(0, features - 1));
  }

  const auto slot_of = [&](int64_t t) { return slots[t] >= 0 && slots[t] < personas ? slots[t] : int32_t{-1}; };
  const personafast::MaskedLinearArgs args = {out.data(),
                                              x.data(),
                                              x.stride(0),
                                              weight.data(),
                                              weight.stride(0),
                                              masks.data(),
                                              slotless ? nullptr : slots.data(),
                                              soft ? gamma.data() : nullptr,
                                              biased ? bias.data() : nullptr,
                                              rows,
                                              outputs,
                                              features,
                                              personas,
                                              dtype};
  require_launched(personafast::masked_linear_cuda(args, nullptr));
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t o = 0; o < outputs; ++o) {
      const int32_t slot = slot_of(t);
      double sum = biased ? bias.get(o) : 0;
      double magnitude = fabs(sum);
      for (int64_t i = 0; i < features; ++i) {
        double gate = 1;
        if (slot >= 0) {
          const uint32_t word = static_cast<uint32_t>(masks[(slot * outputs + o) * words + i / 32]);
          gate = (word >> (i % 32) & 1u) != 0 ? 1 : soft ? static_cast<double>(gamma[slot]) : 0;
        }
        if (gate == 0) continue;  // whatever the weight
        const double term = weight.get(o, i) * gate * x.get(t, i);
        sum += term;
        magnitude += fabs(term);
      }
      const double got = out.get(t, o);
      const double largest = dtype == Dtype::f16 ? 65000 : 0x1p127;
      if (isnan(sum) || isinf(sum)) {
        require(isnan(sum) ? isnan(got) : got == sum, "out[%lld, %lld] is %.9g, expected %.9g",
                static_cast<long long>(t), static_cast<long long>(o), got, sum);
      } else if (magnitude < largest) {  // or the order of the sum may make it infinite
        require_close(got, sum, rounding(dtype, sum) + summing(features, 2 * magnitude), "out", t, o);
      }
    }
  }

  const std::vector<unsigned char> before = out.bytes();
  out.clear();
  emulator::schedule ^= 1;
  emulator::multiprocessors = 132 - emulator::multiprocessors;
  require_launched(personafast::masked_linear_cuda(args, nullptr));
  require(out.bytes() == before, "out depends on the order of threads or on the device");

  if (rows == 0) return;
  const int64_t t = random.between(0, rows - 1);
  Tensor row(random, dtype, {1, outputs}, {outputs, 1});
  personafast::MaskedLinearArgs alone = args;
  alone.out = row.data();
  alone.x = x.at(t, 0);
  alone.slots = slotless ? nullptr : slots.data() + t;
  alone.rows = 1;
  if (features == 0) alone.x = nullptr;
  require_launched(personafast::masked_linear_cuda(alone, nullptr));
  for (int64_t o = 0; o < outputs; ++o) {
    require(row.pattern(0, o) == out.pattern(t, o), "out[%lld, %lld] depends on the other rows",
            static_cast<long long>(t), static_cast<long long>(o));
  }
}

int main(int argc, char** argv) { return run_emulated(argc, argv, 500, one); }
