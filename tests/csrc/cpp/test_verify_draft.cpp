#include "personafast/verify_draft.h"

#include "check.h"
#include "personafast/philox.h"

using namespace check;

constexpr uint32_t kAcceptStream = 11;
constexpr uint32_t kSampleStream = 23;

// Distances from a decision within which fp32 may decide otherwise.
constexpr double kClose = 1e-4;

static void fill_logp(Random& random, Tensor& logp, int64_t rows, int64_t places, int64_t vocabulary) {
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t j = 0; j < places; ++j) {
      std::vector<double> weights;
      double sum = 0;
      const int64_t one = random.between(0, vocabulary - 1);  // at least one token is possible
      for (int64_t v = 0; v < vocabulary; ++v) {
        weights.push_back(v != one && random.chance(5) ? 0 : exp(random.uniform(-4, 2)));
        sum += weights.back();
      }
      for (int64_t v = 0; v < vocabulary; ++v) {
        const double weight = weights[static_cast<size_t>(v)];
        logp.set(weight == 0 ? -HUGE_VAL : log(weight / sum), b, j, v);
      }
    }
  }
}

struct Case {
  const Tensor& target;
  const Tensor* draft;
  const int64_t* tokens;
  int64_t row;
  int64_t length;
  int64_t vocabulary;
  bool block;

  double q(int64_t j, int64_t v) const { return exp(target.get(row, j, v)); }
  double p(int64_t j, int64_t v) const {
    return draft != nullptr ? exp(draft->get(row, j, v)) : v == tokens[j] ? 1.0 : 0.0;
  }
  double ratio(int64_t j) const { return q(j, tokens[j]) / p(j, tokens[j]); }

  std::vector<double> residual(int64_t j, double scale) const {
    std::vector<double> weights;
    for (int64_t v = 0; v < vocabulary; ++v)
      weights.push_back(j == length ? q(j, v) : fmax(0, scale * q(j, v) - p(j, v)));
    return weights;
  }
};

static double total(const std::vector<double>& weights) {
  double sum = 0;
  for (const double weight : weights) sum += weight;
  return sum;
}

// How many tokens stand, and the c_j of the block rule; -1 if a decision is too close to call.
static int64_t accepted(const Case& c, const std::vector<double>& u, std::vector<double>& joint) {
  joint.assign(static_cast<size_t>(c.length) + 1, 1.0);
  if (!c.block) {
    for (int64_t j = 0; j < c.length; ++j) {
      const double ratio = c.ratio(j);
      if (fabs(u[static_cast<size_t>(j)] - ratio) < kClose) return -1;
      if (u[static_cast<size_t>(j)] >= ratio) return j;
    }
    return c.length;
  }
  for (int64_t j = 1; j <= c.length; ++j) {
    const double before = joint[static_cast<size_t>(j - 1)];
    joint[static_cast<size_t>(j)] = before == 0 ? 0 : fmin(1, before * c.ratio(j - 1));
  }
  for (int64_t j = c.length; j > 0; --j) {
    double share = joint[static_cast<size_t>(j)];
    if (j < c.length && share != 1) {
      const double mass = total(c.residual(j, share));
      if (mass + 1 - share < kClose) return -1;
      share = mass / (mass + 1 - share);
    }
    if (fabs(u[static_cast<size_t>(j - 1)] - share) < kClose) return -1;
    if (u[static_cast<size_t>(j - 1)] < share) return j;
  }
  return 0;
}

static void check_row(const Case& c, const std::vector<double>& u, double draw, const int64_t* out, int64_t got) {
  std::vector<double> joint;
  const int64_t stand = accepted(c, u, joint);
  if (stand < 0) return;
  require(got == stand, "accepted[%lld] is %lld, expected %lld", static_cast<long long>(c.row),
          static_cast<long long>(got), static_cast<long long>(stand));
  std::vector<double> weights = c.residual(stand, c.block ? joint[static_cast<size_t>(stand)] : 1);
  if (total(weights) < 10 * kClose) {
    if (total(weights) > 0) return;
    weights = c.residual(c.length, 1);
    for (int64_t v = 0; v < c.vocabulary; ++v) weights[static_cast<size_t>(v)] = c.q(stand, v);
  }
  const double whole = total(weights);
  const int64_t token = out[stand];
  if (whole == 0) return require(token == -1, "a token was drawn from nothing");
  require(token >= 0 && token < c.vocabulary, "the token drawn is %lld", static_cast<long long>(token));
  double before = 0;
  for (int64_t v = 0; v < token; ++v) before += weights[static_cast<size_t>(v)];
  const double after = before + weights[static_cast<size_t>(token)];
  require(draw * whole > before - kClose && draw * whole < after + kClose,
          "row %lld drew %lld, of cumulated weight %.9g to %.9g, for %.9g", static_cast<long long>(c.row),
          static_cast<long long>(token), before, after, draw * whole);
}

static void one(Random& random) {
  const bool wide = random.chance(4);  // enough to wake threads, and more than one tile of words
  const int64_t rows = random.between(0, wide ? 9 : 4);
  const int64_t chunk = random.between(0, 6);
  const int64_t vocabulary = wide ? random.between(1000, 5000) : 1 + random.size(199);
  const Dtype dtype = random.dtype();
  const bool block = random.chance(50);
  const bool has_draft = random.chance(60);

  Tensor target(random, dtype, {rows, chunk + 1, vocabulary}, Tensor::gapped(random, {rows, chunk + 1, vocabulary}));
  Tensor draft(random, dtype, {rows, chunk, vocabulary}, Tensor::gapped(random, {rows, chunk, vocabulary}));
  Buffer<int64_t> tokens(random, rows * chunk, 0);
  Buffer<int32_t> lengths(random, rows, 0);
  Buffer<int64_t> seeds(random, rows, 0);
  Buffer<int64_t> positions(random, rows, 0);
  Buffer<int64_t> out(random, rows * (chunk + 1), -77);
  Buffer<int32_t> stand(random, rows, -77);
  fill_logp(random, target, rows, chunk + 1, vocabulary);
  if (has_draft) fill_logp(random, draft, rows, chunk, vocabulary);
  std::vector<bool> empty;
  int64_t wrong = -1;
  for (int64_t b = 0; b < rows; ++b) {
    lengths[b] = static_cast<int32_t>(random.between(0, chunk));
    seeds[b] = static_cast<int64_t>(random.bits());
    positions[b] = random.chance(5) ? INT64_MAX : random.between(0, 1 << 20);
    for (int64_t j = 0; j < chunk; ++j) {
      // A draft proposes nothing that it excludes; what is beyond the length is rubbish.
      int64_t& token = tokens[b * chunk + j];
      token = random.between(0, vocabulary - 1);
      if (has_draft && isinf(draft.get(b, j, token))) draft.set(-3, b, j, token);
      if (j >= lengths[b]) token = random.pick({int64_t{-1}, INT64_MAX});
    }
    empty.push_back(random.chance(3));
    for (int64_t j = 0; empty.back() && j <= chunk; ++j) {
      for (int64_t v = 0; v < vocabulary; ++v) target.set(-HUGE_VAL, b, j, v);
    }
    if (wrong < 0 && empty.back()) wrong = b;
  }
  bool refused = false;
  if (rows > 0 && random.chance(5)) {
    refused = true;
    wrong = random.between(0, rows - 1);
    if (lengths[wrong] > 0 && random.chance(50)) {
      tokens[wrong * chunk + random.between(0, lengths[wrong] - 1)] = random.pick({int64_t{-1}, vocabulary, INT64_MIN});
    } else {
      lengths[wrong] = random.pick({-1, static_cast<int32_t>(chunk + 1), INT32_MAX, INT32_MIN});
    }
  }

  const personafast::VerifyDraftArgs args = {out.data(),
                                             stand.data(),
                                             target.data(),
                                             target.stride(0),
                                             target.stride(1),
                                             has_draft ? draft.data() : nullptr,
                                             draft.stride(0),
                                             draft.stride(1),
                                             tokens.data(),
                                             lengths.data(),
                                             seeds.data(),
                                             positions.data(),
                                             kAcceptStream,
                                             kSampleStream,
                                             rows,
                                             chunk,
                                             vocabulary,
                                             block,
                                             dtype};
  const int64_t got = personafast::verify_draft_cpu(args, static_cast<int>(random.between(1, 4)));
  require(got == wrong, "verify_draft returned %lld, expected %lld", static_cast<long long>(got),
          static_cast<long long>(wrong));
  if (refused) {
    for (int64_t i = 0; i < out.size(); ++i) require(out[i] == -77, "out was written although a row is wrong");
    return;
  }
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t* row = out.data() + b * (chunk + 1);
    require(stand[b] >= 0 && stand[b] <= lengths[b], "accepted[%lld] is %d", static_cast<long long>(b), stand[b]);
    for (int64_t j = 0; j < stand[b]; ++j) require(row[j] == tokens[b * chunk + j], "an accepted token has changed");
    for (int64_t j = stand[b] + 1; j <= chunk; ++j) require(row[j] == -1, "a token stands after the one drawn");
    std::vector<double> u(static_cast<size_t>(chunk));
    personafast::philox_uniform(u.data(), &seeds[b], &positions[b], kAcceptStream, 1, lengths[b]);
    const int64_t position =
        static_cast<int64_t>(static_cast<uint64_t>(positions[b]) + static_cast<uint64_t>(stand[b]));
    double draw;
    personafast::philox_uniform(&draw, &seeds[b], &position, kSampleStream, 1, 1);
    const Case c = {target, has_draft ? &draft : nullptr, tokens.data() + b * chunk, b, lengths[b], vocabulary, block};
    check_row(c, u, draw, row, stand[b]);
  }
}

int main(int argc, char** argv) { return run(argc, argv, 1500, one); }
