#include "personafast/add_inject_rms_norm.h"

#include "check.h"

using namespace check;

static std::vector<int64_t> row_strides(Random& random, int64_t rows, int64_t width) {
  std::vector<int64_t> strides = Tensor::gapped(random, {rows, width});
  if (random.chance(10)) strides[0] = 0;  // one row expanded
  return strides;
}

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const int64_t rows = large ? random.between(900, 1100) : random.between(0, 9);
  const int64_t width = large ? random.between(150, 250) : random.size(200);
  const int64_t bank_rows = random.between(0, 4);
  const Dtype dtype = random.dtype();

  Tensor normed(random, dtype, {rows, width}, Tensor::dense({rows, width}));
  Tensor residual_out(random, dtype, {rows, width}, Tensor::dense({rows, width}));
  Tensor update(random, dtype, {rows, width}, row_strides(random, rows, width));
  Tensor residual(random, dtype, {rows, width}, row_strides(random, rows, width));
  Tensor bank(random, random.chance(50) ? Dtype::f32 : dtype, {bank_rows, width},
              row_strides(random, bank_rows, width));
  Tensor weight(random, random.chance(50) ? Dtype::f32 : dtype, {width}, {1});
  Buffer<int32_t> slots(random, rows, -1);
  Buffer<float> scale(random, rows, 0);
  const bool scaled = random.chance(70);
  const float eps = random.pick({1e-6f, 1e-5f, 1.0f});
  update.fill(random);
  residual.fill(random);
  bank.fill(random);
  weight.fill(random);
  fill_slots(random, slots, bank_rows);
  for (int64_t t = 0; t < rows; ++t) scale[t] = static_cast<float>(random.uniform(-3, 3));
  const int64_t wrong = spoil_slots(random, slots, bank_rows);

  const personafast::AddInjectRmsNormArgs args = {normed.data(),
                                                  residual_out.data(),
                                                  update.data(),
                                                  update.stride(0),
                                                  residual.data(),
                                                  residual.stride(0),
                                                  dtype,
                                                  bank.data(),
                                                  bank.stride(0),
                                                  bank.dtype(),
                                                  slots.data(),
                                                  scaled ? scale.data() : nullptr,
                                                  weight.data(),
                                                  weight.dtype(),
                                                  eps,
                                                  rows,
                                                  width,
                                                  bank_rows};
  const std::vector<unsigned char> poison = normed.bytes();
  const int64_t got = personafast::add_inject_rms_norm_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "add_inject_rms_norm returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (wrong >= 0) {
    require(normed.bytes() == poison && residual_out.bytes() == poison,
            "outputs were written although a slot is out of range");
    return;
  }
  for (int64_t t = 0; t < rows; ++t) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double factor = slots[t] < 0 ? 0 : scaled ? static_cast<double>(scale[t]) : 1;
      const double added = slots[t] < 0 ? 0 : factor * bank.get(slots[t], i);
      const double sum = update.get(t, i) + residual.get(t, i) + added;
      const double size = fabs(update.get(t, i)) + fabs(residual.get(t, i)) + fabs(added);
      require_close(residual_out.get(t, i), sum, rounding(dtype, sum) + 0x1p-22 * size, "residual_out", t, i);
      squares += residual_out.get(t, i) * residual_out.get(t, i);
    }
    const double inverse = 1 / sqrt(squares / static_cast<double>(width) + static_cast<double>(eps));
    for (int64_t i = 0; i < width; ++i) {
      const double result = residual_out.get(t, i) * inverse * weight.get(i);
      require_close(normed.get(t, i), result, rounding(dtype, result) + summing(width, fabs(result)), "normed", t, i);
    }
  }

  const std::vector<unsigned char> before = normed.bytes();
  normed.clear();
  personafast::add_inject_rms_norm_cpu(args, 1);
  require(normed.bytes() == before, "normed depends on the number of threads");
}

int main(int argc, char** argv) { return run(argc, argv, 1000, one); }
