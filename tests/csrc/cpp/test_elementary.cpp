#include "personafast/elementary.h"

#include "check.h"

using namespace check;

// Bits at random, numbers of ordinary size, and the ends of the range.
static float draw(Random& random, bool logarithm) {
  const uint32_t bits = static_cast<uint32_t>(random.bits());
  float value;
  memcpy(&value, &bits, 4);
  if (random.chance(50)) value = static_cast<float>(random.uniform(-110, 95));
  if (random.chance(10)) value = random.pick({0.0f, -0.0f, 0x1p-149f, -0x1p-149f, 1.0f, HUGE_VALF, -HUGE_VALF, NAN});
  return logarithm && random.chance(90) ? fabsf(value) : value;
}

static void one(Random& random) {
  const bool logarithm = random.chance(50);
  const int64_t count = random.size(200);
  Buffer<float> x(random, count, 0);
  Buffer<float> out(random, count, NAN);
  for (int64_t i = 0; i < count; ++i) x[i] = draw(random, logarithm);
  (logarithm ? personafast::log_cpu : personafast::exp_cpu)(x.data(), out.data(), count);
  for (int64_t i = 0; i < count; ++i) {
    const double exact = logarithm ? log(static_cast<double>(x[i])) : exp(static_cast<double>(x[i]));
    const float rounded = exact < -0x1.ffffffp127 || exact > 0x1.ffffffp127
                              ? copysignf(HUGE_VALF, static_cast<float>(exact > 0) - 0.5f)
                              : static_cast<float>(exact);
    if (isnan(exact) || isinf(rounded)) {
      require(isnan(exact) ? isnan(out[i]) : out[i] == rounded, "%s(%.9g) is %.9g, expected %.9g",
              logarithm ? "log" : "exp", x[i], out[i], exact);
      continue;
    }
    const double ulp = static_cast<double>(nextafterf(fabsf(rounded), HUGE_VALF)) - fabs(rounded);
    require(fabs(out[i] - exact) <= 1.02 * ulp, "%s(%.9g) is %.9g, expected %.9g", logarithm ? "log" : "exp", x[i],
            out[i], exact);
  }
}

int main(int argc, char** argv) { return run(argc, argv, 3000, one); }
