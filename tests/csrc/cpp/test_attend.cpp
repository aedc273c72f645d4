#include "personafast/attend.h"

#include "check.h"

using namespace check;

static void one(Random& random) {
  const int64_t batch = random.between(0, 3);
  const int64_t key_heads = random.between(1, 3);
  const int64_t groups = random.between(1, 4);
  const int64_t queries = random.between(1, 4);
  const int64_t keys = random.chance(20) ? random.between(120, 300) : random.between(1, 40);
  const int64_t width = random.chance(10) ? random.between(200, 256) : random.between(1, 70);
  const int64_t heads = key_heads * groups;
  const Dtype dtype = random.dtype();
  const float scale = static_cast<float>(random.uniform(0.1, 1));

  const auto make = [&](std::vector<int64_t> sizes) {
    return Tensor(random, dtype, sizes, Tensor::gapped(random, sizes));
  };
  Tensor out = make({batch, heads, queries, width});
  Tensor query = make({batch, heads, queries, width});
  Tensor key = make({batch, key_heads, keys, width});
  Tensor value = make({batch, key_heads, keys, width});
  query.fill(random);
  key.fill(random);
  value.fill(random);

  // None, bytes or numbers; one for all sequences or one each.
  const int64_t kind = random.between(0, 2);
  const int64_t masks = random.chance(50) ? 1 : batch;
  const int64_t mask_rows = kind == 0 ? 0 : masks * queries;
  Buffer<uint8_t> bytes(random, kind == 1 ? mask_rows * keys : 0, 0);
  Tensor numbers(random, dtype, {kind == 2 ? mask_rows : 0, keys}, {keys, 1});
  numbers.fill(random);
  for (int64_t i = 0; i < bytes.size(); ++i)
    bytes[i] = random.chance(60) ? static_cast<uint8_t>(random.between(1, 255)) : 0;
  for (int64_t r = 0; kind == 2 && r < mask_rows; ++r) {
    for (int64_t i = 0; i < keys; ++i) {
      if (random.chance(30)) numbers.set(-HUGE_VAL, r, i);
    }
  }

  personafast::AttendArgs args = {};
  args.out = out.data();
  args.out_stride_b = out.stride(0);
  args.out_stride_h = out.stride(1);
  args.out_stride_q = out.stride(2);
  args.query = query.data();
  args.query_stride_b = query.stride(0);
  args.query_stride_h = query.stride(1);
  args.query_stride_q = query.stride(2);
  args.key = key.data();
  args.key_stride_b = key.stride(0);
  args.key_stride_h = key.stride(1);
  args.key_stride_n = key.stride(2);
  args.value = value.data();
  args.value_stride_b = value.stride(0);
  args.value_stride_h = value.stride(1);
  args.value_stride_n = value.stride(2);
  args.mask = kind == 0 ? nullptr : kind == 1 ? static_cast<const void*>(bytes.data()) : numbers.data();
  args.mask_stride_b = masks == 1 ? 0 : queries * keys;
  args.mask_stride_q = keys;
  args.mask_adds = kind == 2;
  args.scale = scale;
  args.batch = batch;
  args.key_heads = key_heads;
  args.groups = groups;
  args.queries = queries;
  args.keys = keys;
  args.width = width;
  args.dtype = dtype;
  personafast::attend_cpu(args, static_cast<int>(random.between(1, 4)));

  std::vector<double> score(static_cast<size_t>(keys));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t j = 0; j < queries; ++j) {
        const int64_t k = h / groups;
        const int64_t row = (masks == 1 ? 0 : b) * queries + j;
        double most = -HUGE_VAL;
        double off = 0;
        for (int64_t i = 0; i < keys; ++i) {
          double sum = 0;
          double magnitude = 0;
          for (int64_t c = 0; c < width; ++c) {
            const double term = query.get(b, h, j, c) * key.get(b, k, i, c);
            sum += term;
            magnitude += fabs(term);
          }
          sum *= static_cast<double>(scale);
          if (kind == 2) sum += numbers.get(row, i);
          if (kind == 1 && bytes[row * keys + i] == 0) sum = -HUGE_VAL;
          score[static_cast<size_t>(i)] = sum;
          most = fmax(most, sum);
          off = fmax(off, summing(width + 8, magnitude * static_cast<double>(scale) + 2));
        }
        double total = 0;
        for (double& s : score) total += s = isinf(most) ? 0 : exp(s - most);
        for (int64_t c = 0; c < width; ++c) {
          double sum = 0;
          double magnitude = 0;
          for (int64_t i = 0; i < keys && total > 0; ++i) {
            const double term = score[static_cast<size_t>(i)] * value.get(b, k, i, c) / total;
            sum += term;
            magnitude += fabs(term);
          }
          const double allowed = rounding(dtype, sum) + 4 * off * magnitude + summing(2 * keys + 40, magnitude);
          require_close(out.get(b, h, j, c), sum, allowed, "out", (b * heads + h) * queries + j, c);
        }
      }
    }
  }
  out.require_untouched_gaps("out");

  const std::vector<unsigned char> before = out.bytes();
  out.clear();
  personafast::attend_cpu(args, 1);
  require(out.bytes() == before, "out depends on the number of threads");
}

int main(int argc, char** argv) { return run(argc, argv, 400, one); }
