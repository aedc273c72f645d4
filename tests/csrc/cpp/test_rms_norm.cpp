#include "personafast/rms_norm.h"

#include "check.h"

using namespace check;

static void one(Random& random) {
  const int64_t rows = random.between(0, 6);
  const int64_t width = random.between(1, 200);
  const Dtype dtype = random.dtype();
  Tensor x(random, dtype, {rows, width}, {width, 1});
  Tensor weight(random, dtype, {1, width}, {width, 1});
  Tensor out(random, dtype, {rows, width}, {width, 1});
  x.fill(random, -3, 3);
  weight.fill(random, -2, 2);
  const float eps = 1e-5f;
  personafast::rms_norm_cpu({out.data(), x.data(), weight.data(), eps, rows, width, dtype});
  for (int64_t t = 0; t < rows; ++t) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += x.get(t, i) * x.get(t, i);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
    for (int64_t i = 0; i < width; ++i) {
      const double expected = weight.get(0, i) * x.get(t, i) * scale;
      // Rounded twice.
      require_close(out.get(t, i), expected, 2 * rounding(dtype, expected) + 1e-6, "out", t, i);
    }
  }
}

int main(int argc, char** argv) { return run(argc, argv, 1000, one); }
