// chunk_scores and chunk_accept on a GPU: a few hundred numbers a row, so that what they cost is the launch and the
// waits that follow one another. Both together are one launch.
//
// A warp takes a row, and loads all that it needs before it uses any of it. First a lane is a token of a member: the
// log ratios are cumulated in fp64, by shuffles, into shared memory. Then a lane is a token, and joins its members in
// their order under the row's rule. Chunks of up to 8 tokens take four members at a time, longer ones tiles of 32
// tokens. What leaves fp64 are differences of what is large, and factors.

#include "personafast/chunk_scores.h"

#include "device.cuh"
#include "personafast/aggregator.h"

namespace personafast {
namespace {

using namespace cuda;

// Weights that sum to 1 up to their rounding sum to 1: an exponent near 0 would make much of the rest.
constexpr double kWhole = 1e-6;

// Members a lane has in flight.
constexpr int kAhead = 4;

constexpr float kInfinity = HUGE_VALF;

// Of one row: the members, and a token's log ratios, which are Width apart.
template <int Width>
struct Members {
  const double* ratios;
  const float* weights;
  const float* logs;  // of the sizes of the weights
  int count;

  // use(weight, ratio, log) for those that take part.
  template <class Use>
  __device__ __forceinline__ void each(Use use) const {
#pragma unroll 1  // code that is run once comes from far away
    for (int i = 0; i < count; ++i) {
      if (weights[i] != 0.0f) use(weights[i], ratios[i * Width], logs[i]);
    }
  }
};

struct Row {
  Aggregator rule;
  float p;
  double size;     // of the weights, summed
  double inverse;  // of that
  float log_size;  // 0 where the weights sum to 1
  bool fault;      // what a CPU refuses
};

template <int Width>
__device__ __forceinline__ double linear(const Members<Width>& members) {
  double top = -kInfinity;
  bool nan = false;
  members.each([&](float, double ratio, float log) {
    const double term = ratio + log;
    nan = nan || term != term;
    top = term > top ? term : top;
  });
  if (nan) return NAN;
  // What is infinite would make NaN of what is infinite too.
  const double base = fabs(top) < kInfinity ? top : 0.0;
  float added = 0.0f, taken = 0.0f;
  members.each([&](float weight, double ratio, float log) {
    const float size = expf(static_cast<float>(ratio + log - base));
    if (weight > 0.0f) {
      added += size;
    } else {
      taken += size;
    }
  });
  const float rest = added - taken;
  const bool left = rest != 0.0f && (taken == 0.0f || !(rest <= kCancelled * added));
  return left ? base + logf(rest) : -kInfinity;
}

// Sum of weight * ratio; -inf if a ratio is.
template <int Width>
__device__ __forceinline__ double product(const Members<Width>& members) {
  double sum = 0.0;
  bool impossible = false;
  members.each([&](float weight, double ratio, float) {
    impossible = impossible || ratio == -kInfinity;
    sum += weight * ratio;
  });
  return impossible ? -kInfinity : sum;
}

// The greatest ratio or the least; NaN if one is.
template <int Width>
__device__ __forceinline__ double extreme(const Members<Width>& members, bool greatest) {
  double found = greatest ? -kInfinity : kInfinity;
  members.each([&](float, double ratio, float) {
    if (!(greatest ? ratio <= found : ratio >= found) && found == found) found = ratio;
  });
  return found;
}

template <int Width>
__device__ __forceinline__ double power(const Members<Width>& members, const Row& row) {
  if (fabsf(row.p) < kSmallestExponent) return product(members) * row.inverse;
  const double top = extreme(members, row.p > 0.0f);
  if (!(fabs(top) < kInfinity)) return top;
  double more = 0.0, sum = 0.0;
  members.each([&](float weight, double ratio, float) {
    const float exponent = static_cast<float>(row.p * (ratio - top));
    more += weight * static_cast<double>(expm1f(exponent));
    sum += weight * static_cast<double>(expf(exponent));
  });
  more *= row.inverse;
  // Far from 1 the sum of what is added is the more exact one.
  const float log = more > -0.25 ? log1pf(static_cast<float>(more)) : logf(static_cast<float>(sum * row.inverse));
  return top + (log + row.log_size) / row.p;
}

template <int Width>
__device__ __forceinline__ double jensen_shannon(const Members<Width>& members, const Row& row) {
  const double least = extreme(members, false);
  if (least != least) return least;
  double u = 0.0;
  if (least > kHarmonicLimit) {
    members.each([&](float weight, double ratio, float) {
      u += weight * static_cast<double>(expf(static_cast<float>(least - ratio)));
    });
    return least - logf(static_cast<float>(u * row.inverse));
  }
  // u = -log s, each term log(1 + e^-ratio).
  members.each([&](float weight, double ratio, float) {
    const double small = log1pf(expf(-fabsf(static_cast<float>(ratio))));
    u += weight * (ratio < 0.0 ? small - ratio : small);
  });
  u *= row.inverse;
  return -u - logf(-expm1f(static_cast<float>(-u)));
}

template <int Width>
__device__ __forceinline__ double join(const Members<Width>& members, const Row& row) {
  switch (row.rule) {
    case Aggregator::linear:
      return linear(members);
    case Aggregator::geometric:
      return product(members);
    case Aggregator::power:
      return power(members, row);
    case Aggregator::jensen_shannon:
      return jensen_shannon(members, row);
    case Aggregator::min:
      return extreme(members, false);
    case Aggregator::max:
      return extreme(members, true);
  }
  return 0.0;
}

// As rule_fits and weights_have_signs ask for, but without raising: such a row is NaN.
template <int Width>
__device__ __forceinline__ Row row_of(const Members<Width>& members, Aggregator rule, float p) {
  Row row = {rule, p, 0.0, 0.0, 0.0f, false};
  bool negative = false;
  members.each([&](float weight, double, float) {
    negative = negative || weight < 0.0f;
    row.size += fabsf(weight);
  });
  const double excess = row.size - 1.0;
  row.inverse = 1.0 / row.size;
  if (fabs(excess) > kWhole) {
    row.log_size = fabs(excess) < 0.25 ? log1pf(static_cast<float>(excess)) : logf(static_cast<float>(row.size));
  }
  row.fault = rule < Aggregator::linear || rule > Aggregator::max || (negative && rule > Aggregator::geometric) ||
              (rule == Aggregator::power && !(fabsf(p) < kInfinity));
  return row;
}

// The place behind the last of the lanes that stand; tokens that are tried from `first` on.
__device__ __forceinline__ int last_standing(int accepted, int64_t first, bool stands) {
  const unsigned standing = __ballot_sync(kAllLanes, stands);
  return standing == 0 ? accepted : static_cast<int>(first) + kWarp - __clz(static_cast<int>(standing));
}

// Width is 8 or 32, and 8 for chunks of up to as many tokens.
template <int Width, bool Accept>
__global__ void __launch_bounds__(kWarp) chunk_scores_kernel(const __grid_constant__ ChunkScoresAcceptArgs a) {
  constexpr int kGroups = kWarp / Width;
  PERSONAFAST_DYNAMIC_SHARED(shared);
  const ChunkScoresArgs& s = a.scores;
  const int count = static_cast<int>(s.members);
  double* ratios = reinterpret_cast<double*>(shared);  // [members, Width]
  float* weights = reinterpret_cast<float*>(ratios + count * Width);
  float* logs = weights + count;
  const int64_t b = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x);
  const int token = lane % Width;
  const int64_t length = Accept ? a.accept.lengths[b] : 0;
  const Aggregator rule = static_cast<Aggregator>(s.aggregator[b]);
  const float p = s.p[b];
  float weight = lane < count ? s.weights[b * count + lane] : 0.0f;
  const Members<Width> members = {ratios + token, weights, logs, count};
  bool excluded = false;
  int accepted = 0;
  for (int64_t first = 0; first < s.chunk; first += Width) {
    const int64_t j = first + token;
    const bool there = j < s.chunk;
    const int64_t at = b * s.chunk + j;
    const float ref = there ? s.ref[at] : 0.0f;
    float bound = 0.0f, u = 0.0f;
    if constexpr (Accept) {
      bound = there ? a.accept.log_bound[at] : 0.0f;
      u = there ? a.accept.log_u[at] : 0.0f;
    }
    const bool barred = ref == -kInfinity;
    for (int start = 0; start < count; start += kAhead * kGroups) {
      float logp[kAhead], carried[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const int64_t i = start + n * kGroups + lane / Width;
        logp[n] = i < count && there ? s.policies[i * s.rows * s.chunk + at] : 0.0f;
        carried[n] = i < count && first == 0 && s.carried ? s.carried[b * count + i] : 0.0f;
      }
      if (first == 0 && start == 0) {
        // Not before all loads are on their way.
#pragma unroll 1
        for (int i = lane; i < count; i += kWarp) {
          if (i >= kWarp) weight = s.weights[b * count + i];
          weights[i] = weight;
          logs[i] = logf(fabsf(weight));
        }
      }
      double before[kAhead];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const int i = start + n * kGroups + lane / Width;
        before[n] = i < count && first > 0 ? ratios[i * Width + Width - 1] : carried[n];
      }
      __syncwarp();  // the ratios of the tile before have been read
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        if (start + n * kGroups >= count) continue;
        const int i = start + n * kGroups + lane / Width;
        double ratio = barred ? static_cast<double>(-kInfinity) : static_cast<double>(logp[n]) - ref;
#pragma unroll
        for (int by = 1; by < Width; by *= 2) {
          const double below = __shfl_up_sync(kAllLanes, ratio, by);
          if (token >= by) ratio += below;
        }
        if (i < count) ratios[i * Width + token] = before[n] + ratio;
      }
    }
    __syncwarp();
    const unsigned gone = __ballot_sync(kAllLanes, barred && lane < Width);
    const unsigned so_far = kAllLanes >> (kWarp - 1 - token);
    float score = 0.0f;
    if (lane < Width && there) {
      const Row row = row_of(members, rule, p);
      if (row.size != 0.0) score = static_cast<float>(join(members, row));
      if (excluded || (gone & so_far) != 0) score = -kInfinity;
      if (row.fault) score = NAN;
      s.out[at] = score;
    }
    excluded = excluded || gone != 0;
    if constexpr (Accept) {
      accepted = last_standing(accepted, first, lane < Width && there && j < length && u < score - bound);
    }
  }
  if constexpr (Accept) {
    if (lane == 0) a.accept.out[b] = accepted;
  }
}

__global__ void __launch_bounds__(kWarp) chunk_accept_kernel(const __grid_constant__ ChunkAcceptArgs a) {
  const int64_t b = blockIdx.x;
  const int64_t length = a.lengths[b];
  int accepted = 0;
  for (int64_t first = 0; first < a.chunk; first += kWarp) {
    const int64_t j = first + threadIdx.x;
    const int64_t at = b * a.chunk + j;
    bool stands = false;
    if (j < a.chunk) {
      const bool less = a.log_u[at] < a.scores[at] - a.log_bound[at];
      stands = less && j < length;
    }
    accepted = last_standing(accepted, first, stands);
  }
  if (threadIdx.x == 0) a.out[b] = accepted;
}

template <bool Accept>
int run(const ChunkScoresAcceptArgs& a, void* stream) {
  const ChunkScoresArgs& s = a.scores;
  if (s.rows == 0 || (s.chunk == 0 && !Accept)) return 0;
  const int width = s.chunk <= 8 ? 8 : kWarp;
  const size_t bytes =
      static_cast<size_t>(s.members) * (static_cast<size_t>(width) * sizeof(double) + 2 * sizeof(float));
  const dim3 grid(static_cast<unsigned>(s.rows));
  return width == 8 ? launch(chunk_scores_kernel<8, Accept>, grid, dim3(kWarp), bytes, stream, a)
                    : launch(chunk_scores_kernel<kWarp, Accept>, grid, dim3(kWarp), bytes, stream, a);
}

}  // namespace

int chunk_scores_cuda(const ChunkScoresArgs& args, void* stream) { return run<false>({args, {}}, stream); }

int chunk_scores_accept_cuda(const ChunkScoresAcceptArgs& args, void* stream) { return run<true>(args, stream); }

int chunk_accept_cuda(const ChunkAcceptArgs& args, void* stream) {
  if (args.rows == 0) return 0;
  return launch(chunk_accept_kernel, dim3(static_cast<unsigned>(args.rows)), dim3(kWarp), 0, stream, args);
}

}  // namespace personafast
