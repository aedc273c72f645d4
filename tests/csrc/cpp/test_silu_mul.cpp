#include "personafast/silu_mul.h"

#include "check.h"

using namespace check;

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const int64_t count = large ? random.between(140000, 150000) : random.size(200);
  const Dtype dtype = random.dtype();
  Tensor gate(random, dtype, {1, count}, {count, 1});
  Tensor up(random, dtype, {1, count}, {count, 1});
  Tensor out(random, dtype, {1, count}, {count, 1});
  const double most = random.pick({2.0, 20.0, 200.0});
  gate.fill(random, -most, most);
  up.fill(random, -3, 3);
  personafast::silu_mul_cpu({out.data(), gate.data(), up.data(), count, dtype}, static_cast<int>(random.between(1, 4)));
  for (int64_t i = 0; i < count; ++i) {
    const double g = gate.get(0, i);
    const double silu = g / (1 + exp(-g));
    const double expected = silu * up.get(0, i);
    // Rounded twice, and the quotient is of fp32 numbers.
    const double allowed =
        rounding(dtype, silu) * fabs(up.get(0, i)) + 0x1p-22 * fabs(expected) + 1e-35;  // exp() overflows
    require_close(out.get(0, i), expected, allowed + 1.01 * rounding(dtype, expected), "out", 0, i);
  }
  const std::vector<unsigned char> before = out.bytes();
  out.clear();
  personafast::silu_mul_cpu({out.data(), gate.data(), up.data(), count, dtype}, 1);
  require(out.bytes() == before, "out depends on the number of threads");
}

int main(int argc, char** argv) { return run(argc, argv, 1000, one); }
