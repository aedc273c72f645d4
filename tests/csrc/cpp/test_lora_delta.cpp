#include "personafast/lora_delta.h"

#include <algorithm>

#include "check.h"

using namespace check;

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads in one of the two passes
  const bool wide = random.chance(50);
  const int64_t rows = large ? 64 : random.between(0, 9);
  const int64_t features = large              ? (wide ? 1100 : 40)
                           : random.chance(3) ? random.between(1000, 2300)
                                              : random.size(200);
  const int64_t outputs = large ? (wide ? 40 : 1100) : random.size(300);
  const int64_t adapters = random.between(large ? 1 : 0, random.chance(30) ? 16 : 4);
  const int64_t rank = large ? 64 : random.between(0, 9);
  const Dtype dtype = random.dtype();

  Tensor out(random, dtype, {rows, outputs}, Tensor::gapped(random, {rows, outputs}));
  std::vector<int64_t> x_strides = Tensor::gapped(random, {rows, features});
  if (random.chance(10)) x_strides[0] = 0;  // one row expanded
  Tensor x(random, dtype, {rows, features}, x_strides);
  Tensor a(random, dtype, {adapters, rank, features}, Tensor::gapped(random, {adapters, rank, features}));
  // Stored as [M, R, O], whose outputs are adjacent, or as [M, O, R].
  std::vector<int64_t> b_strides;
  if (random.chance(70)) {
    b_strides = Tensor::gapped(random, {adapters, rank, outputs});
    std::swap(b_strides[1], b_strides[2]);
  } else {
    b_strides = Tensor::gapped(random, {adapters, outputs, rank});
  }
  Tensor b(random, dtype, {adapters, outputs, rank}, b_strides);
  Buffer<int32_t> slots(random, rows, -1);
  Buffer<float> scale(random, adapters, 0);
  Buffer<int32_t> ranks(random, adapters, 0);
  out.fill(random);
  x.fill(random, -1, 1);
  fill_slots(random, slots, adapters);
  for (int64_t t = 0; large && t < rows; ++t) slots[t] = static_cast<int32_t>(random.between(0, adapters - 1));
  for (int64_t m = 0; m < adapters; ++m) {
    scale[m] = static_cast<float>(random.uniform(-1, 1));
    const int64_t used = large ? rank : random.between(0, rank);
    // Beyond the rank of the adapter there is poison, which is not to be read.
    for (int64_t r = 0; r < used; ++r) {
      for (int64_t i = 0; i < features; ++i) a.set(random.uniform(-1, 1), m, r, i);
      for (int64_t o = 0; o < outputs; ++o) b.set(random.uniform(-1, 1), m, o, r);
    }
    ranks[m] = static_cast<int32_t>(used);
    if (used == rank && random.chance(20)) ranks[m] = INT32_MAX;
    if (used == 0 && random.chance(20)) ranks[m] = -1;
  }
  const int64_t wrong = spoil_slots(random, slots, adapters);

  const personafast::LoraDeltaArgs args = {out.data(),  out.stride(0), x.data(),     x.stride(0),  a.data(),
                                           a.stride(0), a.stride(1),   b.data(),     b.stride(0),  b.stride(1),
                                           b.stride(2), slots.data(),  scale.data(), ranks.data(), rows,
                                           outputs,     features,      adapters,     rank,         dtype};
  std::vector<double> expected(static_cast<size_t>(rows * outputs));
  std::vector<double> allowed(static_cast<size_t>(rows * outputs));
  std::vector<double> inner(static_cast<size_t>(rank));
  std::vector<double> inner_size(static_cast<size_t>(rank));
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t m = wrong >= 0 ? -1 : slots[t];
    const int64_t used = m < 0 ? 0 : std::min<int64_t>(std::max<int64_t>(ranks[m], 0), rank);
    for (int64_t r = 0; r < used; ++r) {
      const size_t k = static_cast<size_t>(r);
      inner[k] = inner_size[k] = 0;
      for (int64_t i = 0; i < features; ++i) {
        const double term = static_cast<double>(scale[m]) * a.get(m, r, i) * x.get(t, i);
        inner[k] += term;
        inner_size[k] += fabs(term);
      }
    }
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = out.get(t, o);
      double magnitude = fabs(sum);
      for (int64_t r = 0; r < used; ++r) {
        sum += inner[static_cast<size_t>(r)] * b.get(m, o, r);
        magnitude += inner_size[static_cast<size_t>(r)] * fabs(b.get(m, o, r));
      }
      const size_t k = static_cast<size_t>(t * outputs + o);
      expected[k] = sum;
      allowed[k] = used == 0 ? 0 : rounding(dtype, sum) + summing(features + rank, magnitude);
    }
  }

  const std::vector<unsigned char> start = out.bytes();
  const int64_t got = personafast::lora_delta_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "lora_delta returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t o = 0; o < outputs; ++o) {
      const size_t k = static_cast<size_t>(t * outputs + o);
      require_close(out.get(t, o), expected[k], allowed[k], "out", t, o);
    }
  }
  out.require_untouched_gaps("out");

  const std::vector<unsigned char> before = out.bytes();
  out.restore(start);
  personafast::lora_delta_cpu(args, 1);
  require(out.bytes() == before, "out depends on the number of threads");
}

int main(int argc, char** argv) { return run(argc, argv, 600, one); }
