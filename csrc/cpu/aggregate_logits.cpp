#include "personafast/aggregate_logits.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "host.h"

namespace personafast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A geometric blend whose weights sum to 1 up to rounding leaves nothing of the reference.
constexpr float kReferenceShare = 1e-6f;

// Tokens whose sum of exp is formed together, tiles of kLogitsTile: they stay in L1 from one pass to the next.
constexpr int64_t kBlock = 4096;

// As kWorkPerThread, in logits read.
constexpr int64_t kLogitsPerThread = 1 << 19;

// What it takes to write one row after another.
class Rows {
 public:
  Rows(const AggregateLogitsArgs& args, Isa isa, int threads)
      : args_(args),
        isa_(isa),
        threads_(threads),
        blocks_((args.vocabulary + kBlock - 1) / kBlock),
        tiles_((args.vocabulary + kLogitsTile - 1) / kLogitsTile),
        active_(static_cast<size_t>(tiles_)),
        maxima_(static_cast<size_t>(tiles_ * (args.members + 1))),
        block_maxima_(static_cast<size_t>(blocks_ * (args.members + 1))),
        sums_(block_maxima_.size()) {}

  void run(int64_t row) {
    const int64_t bytes = args_.dtype == Dtype::f32 ? 4 : 2;
    const float* weights = args_.weights + row * args_.members;
    const float* carried = args_.carried ? args_.carried + row * args_.members : nullptr;
    const void* ref = static_cast<const char*>(args_.ref) + row * args_.ref_stride * bytes;
    const float floor = args_.min_p[row] > 0.0f ? logf(args_.min_p[row]) : -kInfinity;
    out_ = args_.out + row * args_.vocabulary;
    p_ = args_.p[row];
    masked_ = args_.min_p[row] > 0.0f;
    members_.clear();
    offsets_.clear();
    double size = 0.0;
    for (int64_t i = 0; i < args_.members; ++i) size += fabsf(weights[i]);
    // Those that are added before those that are taken away.
    const bool linear = args_.aggregator[row] == static_cast<int32_t>(Aggregator::linear);
    for (const bool taken : {false, true}) {
      for (int64_t i = 0; i < args_.members; ++i) {
        if (weights[i] == 0.0f || taken != (linear && !(weights[i] > 0.0f))) continue;
        const int64_t offset = i * args_.policy_stride_n + row * args_.policy_stride_b;
        members_.push_back({static_cast<const char*>(args_.policies) + offset * bytes, 0.0f, weights[i],
                            static_cast<float>(weights[i] / size), taken ? kInfinity : floor});
        offsets_.push_back(carried ? carried[i] : 0.0);
      }
      if (!taken) added_ = static_cast<int64_t>(members_.size());
    }
    choose(members_.empty() ? Aggregator::geometric : static_cast<Aggregator>(args_.aggregator[row]), ref, floor);
    target();
  }

 private:
  // What the rule makes of the members; adds the reference where it is one of them.
  void choose(Aggregator aggregator, const void* ref, float floor) {
    switch (aggregator) {
      case Aggregator::linear:
        rule_ = LogitsRule::mixture;
        for (size_t i = 0; i < members_.size(); ++i) offsets_[i] += log(fabs(static_cast<double>(members_[i].weight)));
        break;
      case Aggregator::geometric: {
        rule_ = LogitsRule::product;
        float rest = 1.0f;
        for (const LogitsMember& member : members_) rest -= member.weight;
        std::fill(offsets_.begin(), offsets_.end(), 0.0);
        if (members_.empty() || fabsf(rest) > kReferenceShare) {
          members_.push_back({ref, 0.0f, rest, 0.0f, rest > kReferenceShare ? floor : kInfinity});
        }
        break;
      }
      case Aggregator::power:
        rule_ = fabsf(p_) < kSmallestExponent ? LogitsRule::product : LogitsRule::power;
        for (LogitsMember& member : members_) member.weight = member.share;
        break;
      case Aggregator::jensen_shannon:
        rule_ = LogitsRule::jensen_shannon;
        members_.push_back({ref, 0.0f, 0.0f, 0.0f, kInfinity});
        offsets_.push_back(0.0);
        break;
      case Aggregator::min:
        rule_ = LogitsRule::least;
        break;
      case Aggregator::max:
        rule_ = LogitsRule::greatest;
        break;
    }
  }

  template <class Run>
  void each_block(int64_t streams, Run run) {
    split(blocks_, args_.vocabulary * streams, kLogitsPerThread, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) run(block);
    });
  }

  // Calls run(begin, end) on the active tokens of a block, as many at a time as lie side by side.
  template <class Run>
  void each_run(int64_t block, Run run) const {
    int64_t tile = block * (kBlock / kLogitsTile);
    const int64_t last = std::min(tile + kBlock / kLogitsTile, tiles_);
    while (tile < last) {
      const int64_t first = tile;
      while (tile < last && active_[tile] == active_[first]) ++tile;
      if (active_[first]) run(first * kLogitsTile, std::min(tile * kLogitsTile, args_.vocabulary));
    }
  }

  // The largest of some maxima; NaN if one of them is.
  static float top(const float* maxima, int64_t count) {
    float max = -kInfinity;
    bool nan = false;
    for (int64_t i = 0; i < count; ++i) {
      nan |= maxima[i] != maxima[i];
      max = maxima[i] > max ? maxima[i] : max;
    }
    return nan ? kNan : max;
  }

  // log of the sum of exp(x - max) over a row, from each block's sum of exp(x - its own maximum).
  double log_sum(const float* maxima, const float* sums, float max) const {
    double sum = 0.0;
    for (int64_t i = 0; i < blocks_; ++i) {
      if (maxima[i] > -kInfinity) sum += sums[i] * exp(static_cast<double>(maxima[i]) - max);
    }
    return log(sum);
  }

  void weigh_block(int64_t i, int64_t block) {
    const int64_t begin = block * kBlock;
    const int64_t end = std::min(begin + kBlock, args_.vocabulary);
    const int64_t tile = begin / kLogitsTile;
    float* maxima = &maxima_[i * tiles_ + tile];
    PERSONAFAST_RUN(isa_, logits_max, members_[i].logits, args_.dtype, begin, end, maxima);
    if (rule_ == LogitsRule::product) return;
    const int64_t at = i * blocks_ + block;
    const float max = top(maxima, std::min(kBlock / kLogitsTile, tiles_ - tile));
    block_maxima_[at] = max;
    if (!(fabsf(max) < kInfinity)) return;
    PERSONAFAST_RUN(isa_, logits_sum_exp, members_[i].logits, args_.dtype, begin, end, max, &sums_[at]);
  }

  // Finds the largest logit of every member and, for all rules but the product, what takes a shifted logit to the log
  // of its term: the member's offset less the log of its sum of exp. False if one of those is no number.
  bool weigh() {
    const int64_t count = static_cast<int64_t>(members_.size());
    // One member after the other: the memory follows one stream better than several.
    split(blocks_, args_.vocabulary * count, kLogitsPerThread, threads_, [&](int64_t first, int64_t last) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t block = first; block < last; ++block) weigh_block(i, block);
      }
    });
    // What all members have in common is taken out, but not where the reference is compared with them.
    double common = 0.0;
    if (rule_ != LogitsRule::product && rule_ != LogitsRule::jensen_shannon) {
      const double most = *std::max_element(offsets_.begin(), offsets_.end());
      double whole = 0.0;
      for (const double offset : offsets_) whole += exp(offset - most);
      if (most > -kInfinity) common = most + log(whole);
    }
    bool numbers = true;
    for (int64_t i = 0; i < count; ++i) {
      const float max = top(&maxima_[i * tiles_], tiles_);
      // Logits that are not numbers, or all of them infinite, have no softmax.
      members_[i].shift = fabsf(max) < kInfinity ? max : kNan;
      if (rule_ == LogitsRule::product) continue;
      const double offset = offsets_[i] - common;
      members_[i].weight = static_cast<float>(offset - log_sum(&block_maxima_[i * blocks_], &sums_[i * blocks_], max));
      numbers = numbers && offset == offset && fabsf(max) < kInfinity;
    }
    return numbers;
  }

  // Whether a member may support a token of this tile. NaN has to stay, so it counts.
  bool supported(int64_t tile) const {
    for (size_t i = 0; i < members_.size(); ++i) {
      if (!(maxima_[i * tiles_ + tile] - members_[i].shift < members_[i].floor)) return true;
    }
    return false;
  }

  // Writes the target of members_.
  void target() {
    if (rule_ == LogitsRule::product) {
      // Common to all tokens, and nothing to them unless it is infinite.
      double offset = 0.0;
      for (const double log_ratio : offsets_) offset += log_ratio;
      if (offset == -kInfinity) return fill(-kInfinity);
      if (!(offset < kInfinity)) return fill(kNan);
    }
    if (!weigh()) return fill(kNan);
    const LogitsBlend blend = {out_, members_.data(), static_cast<int64_t>(members_.size()), added_, args_.dtype, rule_,
                               p_,   masked_};
    // A mixture is normalised as it is.
    const bool normalised = rule_ == LogitsRule::mixture && added_ == blend.count && !masked_;
    each_block(masked_ ? 1 : blend.count + 1, [&](int64_t block) {
      const int64_t begin = block * (kBlock / kLogitsTile);
      for (int64_t tile = begin; tile < std::min(begin + kBlock / kLogitsTile, tiles_); ++tile) {
        active_[tile] = !masked_ || supported(tile);
        if (active_[tile]) continue;
        const int64_t first = tile * kLogitsTile;
        std::fill(out_ + first, out_ + std::min(first + kLogitsTile, args_.vocabulary), -kInfinity);
      }
      float max = -kInfinity;
      each_run(block, [&](int64_t first, int64_t last) {
        float found = 0.0f;
        PERSONAFAST_RUN(isa_, logits_blend, blend, first, last, &found);
        const float both[2] = {max, found};
        max = top(both, 2);
      });
      block_maxima_[block] = max;
      sums_[block] = 0.0f;
      if (normalised || !(fabsf(max) < kInfinity)) return;
      each_run(block, [&](int64_t first, int64_t last) {
        float sum = 0.0f;
        PERSONAFAST_RUN(isa_, logits_sum_exp, out_, Dtype::f32, first, last, max, &sum);
        sums_[block] += sum;
      });
    });
    float norm = top(block_maxima_.data(), blocks_);
    if (norm == -kInfinity) return;  // no token is left
    if (norm != norm) return fill(kNan);
    if (normalised) return;
    if (norm < kInfinity) norm = static_cast<float>(norm + log_sum(block_maxima_.data(), sums_.data(), norm));
    each_block(1, [&](int64_t block) {
      each_run(block,
               [&](int64_t first, int64_t last) { PERSONAFAST_RUN(isa_, logits_shift, out_, first, last, norm); });
    });
  }

  void fill(float value) { std::fill(out_, out_ + args_.vocabulary, value); }

  const AggregateLogitsArgs& args_;
  const Isa isa_;
  const int threads_;
  const int64_t blocks_, tiles_;
  float* out_ = nullptr;
  float p_ = 0.0f;
  bool masked_ = false;
  LogitsRule rule_ = LogitsRule::product;
  int64_t added_ = 0;
  std::vector<LogitsMember> members_;
  std::vector<double> offsets_;             // [members], log ratios of the text so far, of a mixture with log weights
  std::vector<char> active_;                // [tiles]
  std::vector<float> maxima_;               // [members, tiles]
  std::vector<float> block_maxima_, sums_;  // [members, blocks]
};

int64_t first_wrong_row(const AggregateLogitsArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    if (!rule_fits(args.aggregator[row], args.p[row])) return row;
    if (!(args.min_p[row] >= 0.0f && args.min_p[row] <= 1.0f)) return row;
    if (weights_have_signs(args.aggregator[row])) continue;
    for (int64_t i = 0; i < args.members; ++i) {
      if (args.weights[row * args.members + i] < 0.0f) return row;
    }
  }
  return -1;
}

}  // namespace

int64_t aggregate_logits_cpu(const AggregateLogitsArgs& args, int threads) {
  const int64_t wrong = first_wrong_row(args);
  if (wrong >= 0) return wrong;
  if (args.vocabulary == 0) return -1;
  const Isa isa = isa_chosen();
  // Whole rounds of rows, one a thread; the threads share each of the rest.
  const int64_t whole = args.rows - args.rows % threads;
  if (whole > 0) {
    split(whole, whole * args.vocabulary * (args.members + 2), kLogitsPerThread, threads,
          [&](int64_t begin, int64_t end) {
            Rows rows(args, isa, 1);
            for (int64_t row = begin; row < end; ++row) rows.run(row);
          });
  }
  if (whole < args.rows) {
    Rows rows(args, isa, threads);
    for (int64_t row = whole; row < args.rows; ++row) rows.run(row);
  }
  return -1;
}

}  // namespace personafast
