#include "personafast/masked_linear.h"

#include "check.h"

using namespace check;

// Random words, now and then all bits or none; those beyond the features are rubbish.
static int32_t mask_word(Random& random) {
  const uint32_t word = random.pick({0u, 0xffffffffu, static_cast<uint32_t>(random.bits())});
  return static_cast<int32_t>(word);
}

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const bool wide = random.chance(5);   // more features than a kernel takes at a time
  const int64_t rows = large ? random.between(8, 80) : random.between(0, random.pick({9, 9, 9, 40}));
  const int64_t outputs = large ? random.between(60, 90) : random.between(0, 12);
  const int64_t features = wide ? random.between(1000, 2300) : large ? random.between(200, 400) : random.size(200);
  const int64_t personas = random.between(0, random.pick({2, 4, 30}));
  const int64_t words = (features + 31) / 32;
  const Dtype dtype = random.dtype();

  std::vector<int64_t> x_strides = Tensor::gapped(random, {rows, features});
  if (random.chance(10)) x_strides[0] = 0;  // one row expanded
  Tensor x(random, dtype, {rows, features}, x_strides);
  Tensor weight(random, dtype, {outputs, features}, Tensor::gapped(random, {outputs, features}));
  Tensor bias(random, dtype, {outputs}, {1});
  Tensor out(random, dtype, {rows, outputs}, Tensor::dense({rows, outputs}));
  Buffer<int32_t> masks(random, personas * outputs * words, 0);
  Buffer<int32_t> slots(random, rows, -1);
  Buffer<float> gamma(random, personas, 0);
  const bool soft = random.chance(50);
  const bool biased = random.chance(50);
  x.fill(random);
  weight.fill(random);
  bias.fill(random);
  for (int64_t i = 0; i < masks.size(); ++i) masks[i] = mask_word(random);
  for (int64_t p = 0; p < personas; ++p) gamma[p] = static_cast<float>(random.uniform(-1, 1));
  const bool slotless = random.chance(10);
  fill_slots(random, slots, slotless ? 0 : personas);
  const int64_t wrong = slotless ? -1 : spoil_slots(random, slots, personas);

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
  const std::vector<unsigned char> poison = out.bytes();
  const int64_t got = personafast::masked_linear_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "masked_linear returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (wrong >= 0) {
    require(out.bytes() == poison, "out was written although a slot is out of range");
    return;
  }
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = biased ? bias.get(o) : 0;
      double magnitude = fabs(sum);
      for (int64_t i = 0; i < features; ++i) {
        double gate = 1;
        if (slots[t] >= 0) {
          const uint32_t word = static_cast<uint32_t>(masks[(slots[t] * outputs + o) * words + i / 32]);
          gate = (word >> (i % 32) & 1u) != 0 ? 1 : soft ? static_cast<double>(gamma[slots[t]]) : 0;
        }
        const double term = weight.get(o, i) * gate * x.get(t, i);
        sum += term;
        magnitude += fabs(term);
      }
      require_close(out.get(t, o), sum, rounding(dtype, sum) + summing(features, magnitude), "out", t, o);
    }
  }

  const std::vector<unsigned char> before = out.bytes();
  out.clear();
  personafast::masked_linear_cpu(args, 1);
  require(out.bytes() == before, "out depends on the number of threads");

  if (rows == 0) return;
  const int64_t t = random.between(0, rows - 1);
  Tensor row(random, dtype, {1, outputs}, {outputs, 1});
  personafast::MaskedLinearArgs alone = args;
  alone.out = row.data();
  alone.x = x.at(t, 0);
  alone.slots = slotless ? nullptr : slots.data() + t;
  alone.rows = 1;
  personafast::masked_linear_cpu(alone, 1);
  for (int64_t o = 0; o < outputs; ++o) {
    require(row.pattern(0, o) == out.pattern(t, o), "out[%lld, %lld] depends on the other rows",
            static_cast<long long>(t), static_cast<long long>(o));
  }
}

int main(int argc, char** argv) { return run(argc, argv, 1000, one); }
