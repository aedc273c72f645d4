#include "personafast/token_logprobs.h"

#include <algorithm>

#include "check.h"

using namespace check;

// At times makes the token or the temperature of a row or two wrong. Returns the first such row, or -1.
static int64_t spoil(Random& random, Buffer<int64_t>& tokens, Buffer<float>* temperature, int64_t vocabulary) {
  if (tokens.size() == 0 || !random.chance(10)) return -1;
  const int64_t first = random.between(0, tokens.size() - 1);
  tokens[random.between(first, tokens.size() - 1)] = -1;
  if (temperature != nullptr && random.chance(50)) {
    (*temperature)[first] = random.pick({0.0f, -1.0f, NAN});
  } else {
    tokens[first] = random.pick({int64_t{-1}, INT64_MIN, vocabulary, INT64_MAX});
  }
  return first;
}

static void one(Random& random) {
  const bool large = random.chance(1);  // enough to wake threads
  const bool wide = random.chance(3);   // more features than a kernel takes at a time
  const bool many = random.chance(3);   // more words than there are parts to cut them into
  const int64_t rows = large ? random.between(8, 80) : random.between(0, 9);
  const int64_t vocabulary = many ? random.between(4000, 5000) : wide ? random.between(1, 40) : random.size(200);
  const int64_t features = wide ? random.between(1000, 2300) : many ? random.between(0, 20) : random.size(100);
  const Dtype dtype = random.dtype();

  std::vector<int64_t> hidden_strides = Tensor::gapped(random, {rows, features});
  if (random.chance(10)) hidden_strides[0] = 0;  // one row expanded
  Tensor hidden(random, dtype, {rows, features}, hidden_strides);
  Tensor head(random, dtype, {vocabulary, features}, Tensor::gapped(random, {vocabulary, features}));
  Tensor bias(random, dtype, {vocabulary}, {1});
  Buffer<float> out(random, rows, NAN);
  Buffer<int64_t> tokens(random, rows, 0);
  Buffer<float> temperature(random, rows, 1);
  const bool tempered = random.chance(50);
  const bool biased = random.chance(50);
  const float logit_scale = random.pick({1.0f, 1.0f, 0.25f, 2.0f});
  const float softcap = random.pick({0.0f, 0.0f, 1.0f, 30.0f});
  hidden.fill(random);
  head.fill(random, -1, 1);
  bias.fill(random);
  int64_t wrong = vocabulary == 0 && rows > 0 ? 0 : -1;
  for (int64_t t = 0; t < rows; ++t) {
    tokens[t] = vocabulary == 0 ? 0 : random.between(0, vocabulary - 1);
    temperature[t] = static_cast<float>(random.uniform(0.3, 2));
  }
  if (wrong < 0) wrong = spoil(random, tokens, tempered ? &temperature : nullptr, vocabulary);

  const personafast::TokenLogprobsArgs args = {out.data(),
                                               hidden.data(),
                                               hidden.stride(0),
                                               head.data(),
                                               head.stride(0),
                                               tokens.data(),
                                               tempered ? temperature.data() : nullptr,
                                               biased ? bias.data() : nullptr,
                                               logit_scale,
                                               softcap,
                                               rows,
                                               vocabulary,
                                               features,
                                               dtype};
  const int64_t got = personafast::token_logprobs_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "token_logprobs returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (wrong >= 0) {
    for (int64_t t = 0; t < rows; ++t) require(isnan(out[t]), "out was written although a row is wrong");
    return;
  }
  std::vector<double> logits(static_cast<size_t>(vocabulary));
  for (int64_t t = 0; t < rows; ++t) {
    const double divisor = tempered ? static_cast<double>(temperature[t]) : 1;
    double error = 0, most = 0, top = -HUGE_VAL;
    for (int64_t v = 0; v < vocabulary; ++v) {
      double sum = biased ? bias.get(v) : 0;
      double magnitude = fabs(sum);
      for (int64_t i = 0; i < features; ++i) {
        const double term = head.get(v, i) * hidden.get(t, i);
        sum += term;
        magnitude += fabs(term);
      }
      sum *= logit_scale;
      error = std::max(error, summing(features + 8, magnitude * fabs(logit_scale)) / divisor);
      if (softcap > 0) sum = softcap * tanh(sum / softcap);
      const double logit = sum / divisor;
      logits[static_cast<size_t>(v)] = logit;
      top = std::max(top, logit);
      most = std::max(most, fabs(logit));
    }
    double whole = 0;
    for (const double logit : logits) whole += exp(logit - top);
    const double expected = logits[static_cast<size_t>(tokens[t])] - top - log(whole);
    const double allowed = 2 * error + 1e-6 * (1 + most + softcap / divisor) + rounding(Dtype::f32, expected);
    require_close(out[t], expected, allowed, "out", t, tokens[t]);
  }

  Buffer<float> again(random, rows, NAN);
  personafast::TokenLogprobsArgs other = args;
  other.out = again.data();
  personafast::token_logprobs_cpu(other, 1);
  for (int64_t t = 0; t < rows; ++t) require(again[t] == out[t], "out depends on the number of threads");

  if (rows == 0) return;
  const int64_t t = random.between(0, rows - 1);
  other.hidden = hidden.at(t, 0);
  other.tokens = tokens.data() + t;
  other.temperature = tempered ? temperature.data() + t : nullptr;
  other.rows = 1;
  personafast::token_logprobs_cpu(other, 1);
  require(again[0] == out[t], "out[%lld] depends on the other rows", static_cast<long long>(t));
}

int main(int argc, char** argv) { return run(argc, argv, 800, one); }
