#include "personafast/add_inject_rms_norm.h"

#include "check.h"
#include "emulated.h"

using namespace check;

static std::vector<int64_t> read_strides(Random& random, int64_t rows, int64_t width) {
  std::vector<int64_t> strides = row_strides(random, rows, width);
  if (random.chance(10)) strides[0] = 0;  // one row expanded
  return strides;
}

static void one(Random& random) {
  const int64_t rows = random.between(0, 4);
  const int64_t width = some_width(random);
  const int64_t bank_rows = random.between(0, 4);
  const Dtype dtype = random.dtype();
  Tensor normed(random, dtype, {rows, width}, Tensor::dense({rows, width}));
  Tensor residual_out(random, dtype, {rows, width}, Tensor::dense({rows, width}));
  Tensor update(random, dtype, {rows, width}, read_strides(random, rows, width));
  Tensor residual(random, dtype, {rows, width}, read_strides(random, rows, width));
  Tensor bank(random, random.chance(50) ? Dtype::f32 : dtype, {bank_rows, width},
              read_strides(random, bank_rows, width));
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
  spoil_slots(random, slots, bank_rows);
  fill_scale(random, scale, slots, bank_rows);

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
  require_launched(personafast::add_inject_rms_norm_cuda(args, nullptr));
  for (int64_t t = 0; t < rows; ++t) {
    const bool steered = slots[t] >= 0 && slots[t] < bank_rows;
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) {
      // To the bit: each sum and product is rounded on its own.
      float sum = static_cast<float>(update.get(t, i)) + static_cast<float>(residual.get(t, i));
      if (steered) sum += static_cast<float>(bank.get(slots[t], i)) * (scaled ? scale[t] : 1.0f);
      require(residual_out.pattern(t, i) == residual_out.rounded(sum),
              "residual_out[%lld, %lld] is %.9g, expected %.9g", static_cast<long long>(t), static_cast<long long>(i),
              residual_out.get(t, i), static_cast<double>(sum));
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
  emulator::schedule ^= 1;
  require_launched(personafast::add_inject_rms_norm_cuda(args, nullptr));
  require(normed.bytes() == before, "normed depends on the order of threads");
}

int main(int argc, char** argv) { return run_emulated(argc, argv, 1000, one); }
