#include "personafast/verify_draft.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "host.h"
#include "personafast/philox.h"
#include "scalar_float.h"

namespace personafast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// As kWorkPerThread, in tokens of the vocabulary whose exp is taken.
constexpr int64_t kTokensPerThread = 1 << 17;

double element(const void* base, int64_t i, Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return scalar::load<Dtype::f32>(base, i);
    case Dtype::bf16:
      return scalar::load<Dtype::bf16>(base, i);
    case Dtype::f16:
      return scalar::load<Dtype::f16>(base, i);
  }
  return 0.0;
}

class Rows {
 public:
  Rows(const VerifyDraftArgs& args, Isa isa)
      : args_(args),
        isa_(isa),
        bytes_(args.dtype == Dtype::f32 ? 4 : 2),
        u_(static_cast<size_t>(args.chunk)),
        joint_(static_cast<size_t>(args.chunk + 1)),
        sums_(static_cast<size_t>((args.vocabulary + kResidualTile - 1) / kResidualTile)),
        weights_(kResidualTile) {}

  void run(int64_t row) {
    const int64_t length = args_.lengths[row];
    philox_uniform(u_.data(), args_.seeds + row, args_.positions + row, args_.accept_stream, 1, length);
    int64_t kept = 0;
    double mass = -1.0;  // of the residual after `kept` tokens, once it has been summed
    if (args_.block) {
      joint_[0] = 1.0;
      for (int64_t j = 1; j <= length; ++j) {
        joint_[j] = joint_[j - 1] * ratio(row, j - 1);
        if (joint_[j] > 1.0) joint_[j] = 1.0;
      }
      for (kept = length; kept > 0; --kept) {
        double share = joint_[kept];
        mass = -1.0;
        if (kept < length && share != 1.0) {
          mass = sum(residual(row, kept, share));
          share = mass / (mass + 1.0 - share);
        }
        if (u_[kept - 1] < share) break;
      }
      if (kept == 0) mass = -1.0;
    } else {
      while (kept < length && u_[kept] < ratio(row, kept)) ++kept;
    }

    Residual from = kept < length ? residual(row, kept, args_.block ? joint_[kept] : 1.0) : whole(row, kept);
    if (mass < 0.0) mass = sum(from);
    if (mass == 0.0 && kept < length) {
      // Nothing is left where target and draft agree up to rounding.
      from = whole(row, kept);
      mass = sum(from);
    }
    const int64_t* tokens = args_.tokens + row * args_.chunk;
    int64_t* out = args_.out + row * (args_.chunk + 1);
    std::copy(tokens, tokens + kept, out);
    out[kept] = mass > 0.0 && mass < kInfinity ? draw(from, mass, row, kept) : -1;
    std::fill(out + kept + 1, out + args_.chunk + 1, -1);
    args_.accepted[row] = static_cast<int32_t>(kept);
  }

 private:
  const void* target(int64_t row, int64_t j) const {
    return static_cast<const char*>(args_.target) + (row * args_.target_stride_b + j * args_.target_stride_j) * bytes_;
  }

  const void* draft(int64_t row, int64_t j) const {
    if (args_.draft == nullptr) return nullptr;
    return static_cast<const char*>(args_.draft) + (row * args_.draft_stride_b + j * args_.draft_stride_j) * bytes_;
  }

  // Target over draft of drafted token j. NaN, for a token that neither can produce, rejects it and, in a block, all
  // that follow.
  double ratio(int64_t row, int64_t j) const {
    const int64_t token = args_.tokens[row * args_.chunk + j];
    const double log_q = element(target(row, j), token, args_.dtype);
    const double log_p = args_.draft ? element(draft(row, j), token, args_.dtype) : 0.0;
    return exp(log_q - log_p);
  }

  Residual whole(int64_t row, int64_t j) const { return {target(row, j), nullptr, -1, 1.0f, args_.dtype}; }

  Residual residual(int64_t row, int64_t j, double scale) const {
    const int64_t certain = args_.draft ? -1 : args_.tokens[row * args_.chunk + j];
    return {target(row, j), draft(row, j), certain, static_cast<float>(scale), args_.dtype};
  }

  // Fills sums_, by tile; NaN if a weight is.
  double sum(const Residual& from) {
    PERSONAFAST_RUN(isa_, residual_sums, from, 0, args_.vocabulary, sums_.data());
    double total = 0.0;
    for (const float part : sums_) total += part;
    return total;
  }

  // The first token whose cumulated weight exceeds u times `total`, which is that of sums_.
  int64_t draw(const Residual& from, double total, int64_t row, int64_t kept) {
    // Wraps around where positions end, as in torch.
    const int64_t position =
        static_cast<int64_t>(static_cast<uint64_t>(args_.positions[row]) + static_cast<uint64_t>(kept));
    double u;
    philox_uniform(&u, args_.seeds + row, &position, args_.sample_stream, 1, 1);
    double before = 0.0, left = 0.0;
    const double wanted = u * total;
    size_t tile = 0;
    for (size_t t = 0; t < sums_.size(); ++t) {
      if (sums_[t] == 0.0f) continue;
      // Where rounding leaves u on the total the last tile of any weight takes it.
      tile = t;
      left = wanted - before;
      before += sums_[t];
      if (before > wanted) break;
    }
    const int64_t begin = static_cast<int64_t>(tile) * kResidualTile;
    const int64_t end = std::min(begin + kResidualTile, args_.vocabulary);
    PERSONAFAST_RUN(isa_, residual_weights, from, begin, end, weights_.data());
    double whole = 0.0;
    for (int64_t i = 0; i < end - begin; ++i) whole += weights_[i];
    // The tile's sum was formed in another order: the same share of this one leaves no gap.
    const double share = left / sums_[tile] * whole;
    double cumulated = 0.0;
    int64_t token = begin;
    for (int64_t i = 0; i < end - begin; ++i) {
      if (weights_[i] == 0.0f) continue;
      token = begin + i;
      cumulated += weights_[i];
      if (cumulated > share) break;
    }
    return token;
  }

  const VerifyDraftArgs& args_;
  const Isa isa_;
  const int64_t bytes_;
  std::vector<double> u_, joint_;
  std::vector<float> sums_, weights_;
};

int64_t first_wrong_row(const VerifyDraftArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t length = args.lengths[row];
    if (length < 0 || length > args.chunk) return row;
    for (int64_t j = 0; j < length; ++j) {
      const int64_t token = args.tokens[row * args.chunk + j];
      if (token < 0 || token >= args.vocabulary) return row;
    }
  }
  return -1;
}

}  // namespace

int64_t verify_draft_cpu(const VerifyDraftArgs& args, int threads) {
  const int64_t wrong = first_wrong_row(args);
  if (wrong >= 0) return wrong;
  const Isa isa = isa_chosen();
  const int64_t passes = args.block ? args.chunk + 1 : 1;
  split(args.rows, args.rows * args.vocabulary * passes, kTokensPerThread, threads, [&](int64_t begin, int64_t end) {
    Rows rows(args, isa);
    for (int64_t row = begin; row < end; ++row) rows.run(row);
  });
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.out[row * (args.chunk + 1) + args.accepted[row]] < 0) return row;
  }
  return -1;
}

}  // namespace personafast
