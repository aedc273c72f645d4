#include "personafast/lora_delta.h"

#include <algorithm>

#include "check.h"
#include "emulated.h"

using namespace check;

// Rows that 16 bytes divide, at addresses that they divide, or anything.
static std::vector<int64_t> some_strides(Random& random, const std::vector<int64_t>& sizes, bool wide) {
  if (!wide) return Tensor::gapped(random, sizes);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) {
    strides[d - 1] = (strides[d] * std::max<int64_t>(sizes[d], 1) + 7) / 8 * 8 + random.pick<int64_t>({0, 0, 8, 40});
  }
  return strides;
}

static void one(Random& random) {
  const bool wide = random.chance(75);
  const bool large = random.chance(4);  // more than all warps take at a time
  const int64_t rows = random.between(0, random.pick({1, 4, 9, 18}));
  int64_t features = large && random.chance(50) ? random.between(4000, 4700) : random.size(random.pick({40, 200, 700}));
  int64_t outputs = large ? random.between(200, 1300) : random.size(random.pick({40, 300}));
  if (wide) {
    features = (features + 7) / 8 * 8;
    outputs = (outputs + 7) / 8 * 8;
  }
  // Up to 32 adapters their ranks are known early.
  const int64_t adapters = large ? random.between(1, 2) : random.between(0, random.pick({1, 3, 8, 40}));
  const int64_t rank = large ? random.between(1, 20) : random.between(0, random.pick({4, 16, 17, 64}));
  const Dtype dtype = random.dtype();

  Tensor out(random, dtype, {rows, outputs}, Tensor::gapped(random, {rows, outputs}));
  std::vector<int64_t> x_strides = some_strides(random, {rows, features}, wide);
  if (random.chance(10)) x_strides[0] = 0;  // one row expanded
  Tensor x(random, dtype, {rows, features}, x_strides);
  Tensor a(random, dtype, {adapters, rank, features}, some_strides(random, {adapters, rank, features}, wide));
  // Stored as [M, R, O], whose outputs are adjacent, or as [M, O, R].
  std::vector<int64_t> b_strides;
  if (wide || random.chance(50)) {
    b_strides = some_strides(random, {adapters, rank, outputs}, wide);
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
  fill_slots(random, slots, random.chance(30) ? std::min<int64_t>(adapters, 1) : adapters);
  spoil_slots(random, slots, adapters);
  const auto used = [&](int64_t m) { return std::find(slots.data(), slots.data() + rows, m) != slots.data() + rows; };
  for (int64_t m = 0; m < adapters; ++m) {
    scale[m] = static_cast<float>(random.uniform(-1, 1));
    const int64_t own = random.chance(50) ? rank : random.between(0, rank);
    // Beyond the rank of the adapter, and in adapters of no row, there is poison, which is not to be read.
    for (int64_t r = 0; r < own && used(m); ++r) {
      for (int64_t i = 0; i < features; ++i) a.set(random.uniform(-1, 1), m, r, i);
      for (int64_t o = 0; o < outputs; ++o) b.set(random.uniform(-1, 1), m, o, r);
    }
    ranks[m] = static_cast<int32_t>(own);
    if (own == rank && random.chance(20)) ranks[m] = INT32_MAX;
    if (own == 0 && random.chance(20)) ranks[m] = -1;
  }

  const personafast::LoraDeltaArgs args = {out.data(),  out.stride(0), x.data(),     x.stride(0),  a.data(),
                                           a.stride(0), a.stride(1),   b.data(),     b.stride(0),  b.stride(1),
                                           b.stride(2), slots.data(),  scale.data(), ranks.data(), rows,
                                           outputs,     features,      adapters,     rank,         dtype};
  std::vector<double> expected(static_cast<size_t>(rows * outputs));
  std::vector<double> allowed(static_cast<size_t>(rows * outputs));
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t m = slots[t] >= 0 && slots[t] < adapters ? slots[t] : -1;
    const int64_t own = m < 0 ? 0 : std::min<int64_t>(std::max<int64_t>(ranks[m], 0), rank);
    std::vector<double> inner(static_cast<size_t>(own)), inner_size(static_cast<size_t>(own));
    for (int64_t r = 0; r < own; ++r) {
      for (int64_t i = 0; i < features; ++i) {
        const double term = static_cast<double>(scale[m]) * a.get(m, r, i) * x.get(t, i);
        inner[static_cast<size_t>(r)] += term;
        inner_size[static_cast<size_t>(r)] += fabs(term);
      }
    }
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = out.get(t, o);
      double magnitude = fabs(sum);
      for (int64_t r = 0; r < own; ++r) {
        sum += inner[static_cast<size_t>(r)] * b.get(m, o, r);
        magnitude += inner_size[static_cast<size_t>(r)] * fabs(b.get(m, o, r));
      }
      const size_t k = static_cast<size_t>(t * outputs + o);
      expected[k] = sum;
      allowed[k] = own == 0 ? 0 : rounding(dtype, sum) + summing(features + rank, magnitude);
    }
  }

  const std::vector<unsigned char> start = out.bytes();
  require_launched(personafast::lora_delta_cuda({args, nullptr}, nullptr));
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t o = 0; o < outputs; ++o) {
      const size_t k = static_cast<size_t>(t * outputs + o);
      require_close(out.get(t, o), expected[k], allowed[k], "out", t, o);
    }
  }
  out.require_untouched_gaps("out");

  const std::vector<unsigned char> after = out.bytes();
  out.restore(start);
  emulator::schedule ^= 1;
  emulator::multiprocessors = 132 - emulator::multiprocessors;
  Buffer<float> inner(random, (rows + 7) / 8 * personafast::kLoraDeltaInner * rank, NAN);
  require_launched(personafast::lora_delta_cuda({args, inner.data()}, nullptr));
  require(out.bytes() == after, "two launches give something else, or the order of threads or the device matters");

  if (rows == 0) return;
  const int64_t t = random.between(0, rows - 1);
  out.restore(start);
  personafast::LoraDeltaArgs alone = args;
  alone.out = out.at(t, int64_t{0});
  alone.x = x.at(t, int64_t{0});
  alone.slots = slots.data() + t;
  alone.rows = 1;
  if (outputs == 0) alone.out = nullptr;
  if (features == 0) alone.x = nullptr;
  require_launched(personafast::lora_delta_cuda({alone, nullptr}, nullptr));
  std::vector<uint32_t> row;
  for (int64_t o = 0; o < outputs; ++o) row.push_back(out.pattern(t, o));
  out.restore(after);
  for (int64_t o = 0; o < outputs; ++o) {
    require(row[static_cast<size_t>(o)] == out.pattern(t, o), "out[%lld, %lld] depends on the other rows",
            static_cast<long long>(t), static_cast<long long>(o));
  }
}

// A rank that the kernel has no room for is refused, and nothing is written.
static void test_a_rank_beyond_the_limit() {
  float one = 1.0f;
  int32_t zero = 0, rank = 65;
  const personafast::LoraDeltaArgs args = {&one, 1,     &one, 1,     &one, 0, 0, &one, 0,  0,
                                           0,    &zero, &one, &rank, 1,    1, 1, 1,    65, Dtype::f32};
  require(personafast::lora_delta_cuda({args, nullptr}, nullptr) != 0, "a rank of 65 was taken");
  require(one == 1.0f, "a refused call wrote");
}

int main(int argc, char** argv) {
  test_a_rank_beyond_the_limit();
  return run_emulated(argc, argv, 150, one);
}
