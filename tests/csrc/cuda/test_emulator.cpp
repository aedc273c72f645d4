// The emulator itself: what CUDA promises holds, and what it leaves undefined ends the process.

#include <sys/wait.h>

#include <string>

#include "device.cuh"
#include "emulated.h"

using namespace check;
using namespace personafast::cuda;

namespace {

struct Sums {
  const float* values;  // [blocks, threads]
  float* sums;          // [blocks]
  bool synchronised;
};

// Over a warp by shuffles, then over the block through shared memory; at times a barrier is forgotten.
void sum_kernel(Sums a) {
  PERSONAFAST_SHARED(float, parts, 32);
  float value = a.values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  if (a.synchronised) __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) value += parts[w];
    a.sums[blockIdx.x] = value;
  }
}

void test_sums(Random& random) {
  const int64_t blocks = random.between(1, 4), threads = 32 * random.between(1, 8);
  Buffer<float> values(random, blocks * threads, 0), sums(random, blocks, -1);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.between(-50, 50));
  const dim3 grid(static_cast<uint32_t>(blocks)), block(static_cast<uint32_t>(threads));
  require_launched(launch(sum_kernel, grid, block, 0, nullptr, Sums{values.data(), sums.data(), true}));
  for (int64_t b = 0; b < blocks; ++b) {
    float sum = 0;
    for (int64_t i = 0; i < threads; ++i) sum += values[b * threads + i];
    require(sums[b] == sum, "block %lld sums to %g, expected %g", static_cast<long long>(b),
            static_cast<double>(sums[b]), static_cast<double>(sum));
  }
}

struct Lanes {
  int* up;
  int* down;
  int* first;
  unsigned* ballot;
  unsigned* match;
};

// A quarter of each warp leaves; the others go on without it.
void lanes_kernel(Lanes a) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  a.up[t] = __shfl_up_sync(kAllLanes, t, 1);
  a.down[t] = __shfl_down_sync(kAllLanes, t, 2);
  if (lane >= 24) return;
  a.first[t] = __shfl_sync(0x00ffffffu, t, 0);
  a.ballot[t] = __ballot_sync(0x00ffffffu, lane % 3 == 0);
  a.match[t] = __match_any_sync(0x00ffffffu, static_cast<uint32_t>(lane % 3));
  __syncthreads();
}

void test_lanes(Random& random) {
  Buffer<int> up(random, 64, -1), down(random, 64, -1), first(random, 64, -1);
  Buffer<unsigned> ballot(random, 64, 0), match(random, 64, 0);
  require_launched(launch(lanes_kernel, dim3(1), dim3(64), 0, nullptr,
                          Lanes{up.data(), down.data(), first.data(), ballot.data(), match.data()}));
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32;
    require(up[t] == (lane == 0 ? t : t - 1) && down[t] == (lane > 29 ? t : t + 2), "thread %d shifts wrongly", t);
    require(first[t] == (lane < 24 ? t - lane : -1), "thread %d reads lane 0 wrongly", t);
    require(ballot[t] == (lane < 24 ? 0x00249249u : 0u), "thread %d votes wrongly", t);
    require(match[t] == (lane < 24 ? 0x00249249u << (lane % 3) : 0u), "thread %d matches wrongly", t);
  }
}

struct Product {
  const uint16_t* a;  // [16, 16]
  const uint16_t* b;  // [16, 8]
  float* d;           // [16, 8]
  bool bf16;
};

void product_kernel(Product p) {
  const unsigned g = threadIdx.x / 4, c = threadIdx.x % 4;
  const auto pair = [](uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; };
  const auto row = [&](unsigned i, unsigned k) { return pair(p.a[16 * i + k], p.a[16 * i + k + 1]); };
  const auto column = [&](unsigned k, unsigned j) { return pair(p.b[8 * k + j], p.b[8 * (k + 1) + j]); };
  const uint32_t a[4] = {row(g, 2 * c), row(g + 8, 2 * c), row(g, 2 * c + 8), row(g + 8, 2 * c + 8)};
  const uint32_t b[2] = {column(2 * c, g), column(2 * c + 8, g)};
  float d[4] = {1, 2, 3, 4};
  p.bf16 ? mma_bf16(d, a, b) : mma_f16(d, a, b);
  for (unsigned i = 0; i < 4; ++i) p.d[8 * (g + i / 2 * 8) + 2 * c + i % 2] = d[i];
}

void test_products(Random& random) {
  const Dtype dtype = random.pick({Dtype::bf16, Dtype::f16});
  Tensor a(random, dtype, {16, 16}, {16, 1}), b(random, dtype, {16, 8}, {8, 1}), d(random, Dtype::f32, {16, 8}, {8, 1});
  a.fill(random);
  b.fill(random);
  require_launched(launch(product_kernel, dim3(1), dim3(32), 0, nullptr,
                          Product{static_cast<const uint16_t*>(a.data()), static_cast<const uint16_t*>(b.data()),
                                  static_cast<float*>(d.data()), dtype == Dtype::bf16}));
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t j = 0; j < 8; ++j) {
      double sum = static_cast<double>(1 + i / 8 * 2 + j % 2);
      for (int64_t k = 0; k < 16; ++k) sum += a.get(i, k) * b.get(k, j);
      require_close(d.get(i, j), sum, 1e-5, "d", i, j);
    }
  }
}

struct Exchange {
  const float* values;  // [blocks, threads]
  float* sums;          // [blocks]
  bool meets;           // before blocks send to each other
  bool waits;           // for what the others send
  uint32_t missing;     // bytes that the mailbox is not told of
};

// Every block sends its numbers to all of its cluster, of 4, and adds up what it got.
void exchange_kernel(Exchange a) {
  PERSONAFAST_DYNAMIC_SHARED(shared);
  uint64_t* const box = reinterpret_cast<uint64_t*>(shared);
  float* const received = reinterpret_cast<float*>(box + 1);
  const unsigned rank = blockIdx.x % 4, count = blockDim.x;
  if (threadIdx.x == 0) mailbox_open(box, 16 * count - a.missing);
  if (a.meets) cluster_arrive();
  const float value = a.values[blockIdx.x * count + threadIdx.x];
  if (a.meets) cluster_wait();
  for (unsigned to = 0; to < 4; ++to) mailbox_send(received + rank * count + threadIdx.x, box, to, value);
  if (!a.waits) return;
  mailbox_wait(box);
  float sum = 0;
  for (unsigned i = 0; i < 4 * count; ++i) sum += received[i];
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

void test_clusters(Random& random) {
  const int64_t blocks = 4 * random.between(1, 3), threads = random.between(1, 40);
  Buffer<float> values(random, blocks * threads, 0), sums(random, blocks, -1);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(random.between(-50, 50));
  require_launched(launch_clusters(exchange_kernel, dim3(static_cast<uint32_t>(blocks)), 4,
                                   dim3(static_cast<uint32_t>(threads)), static_cast<size_t>(threads) * 16 + 8, nullptr,
                                   Exchange{values.data(), sums.data(), true, true, 0}));
  for (int64_t b = 0; b < blocks; ++b) {
    float sum = 0;
    for (int64_t i = 0; i < 4 * threads; ++i) sum += values[b / 4 * 4 * threads + i];
    require(sums[b] == sum, "block %lld has %g, expected %g", static_cast<long long>(b), static_cast<double>(sums[b]),
            static_cast<double>(sum));
  }
}

struct Copies {
  const float* from;  // [2, 4]
  float* early;       // [4]
  float* to;          // [2, 4]
  bool waits;
};

// Two groups in flight; what has not been waited for has not come.
void copies_kernel(Copies a) {
  PERSONAFAST_DYNAMIC_SHARED(shared);
  float* place = reinterpret_cast<float*>(shared);
  for (int i = 0; i < 2; ++i) {
    copy16_async(place + 4 * i, a.from + 4 * i);
    copies_commit();
  }
  if (a.waits) copies_wait<1>();
  for (int i = 0; i < 4; ++i) a.to[i] = place[i];
  for (int i = 0; i < 4; ++i) a.early[i] = place[4 + i];
  if (a.waits) copies_wait<0>();
  for (int i = 4; i < 8; ++i) a.to[i] = place[i];
}

void test_copies(Random& random) {
  alignas(16) float from[8];
  float early[4], to[8];
  for (float& value : from) value = static_cast<float>(random.uniform(-1, 1));
  require_launched(launch(copies_kernel, dim3(1), dim3(1), 32, nullptr, Copies{from, early, to, true}));
  require(memcmp(from, to, sizeof(to)) == 0, "the copies differ");
  for (float value : early) require(isnan(value), "shared memory was not poisoned");
}

void test_numbers(Random& random) {
  // NaN apart: a GPU has one of its own.
  const uint32_t low = static_cast<uint32_t>(random.bits()), high = static_cast<uint32_t>(random.bits());
  const float value = random.chance(50) ? float_of(low) : static_cast<float>(random.uniform(-9, 9));
  const uint32_t half = high & 0xffffu;
  if (!isnan(value)) {
    require(floats_to_bf16x2(value, 1.0f) == (0x3f800000u | to_bf16(static_cast<double>(value))), "bf16 of %a",
            static_cast<double>(value));
    require(floats_to_f16x2(1.0f, value) == (static_cast<uint32_t>(to_f16(static_cast<double>(value))) << 16 | 0x3c00u),
            "f16 of %a", static_cast<double>(value));
  }
  const double exact = from_f16(static_cast<uint16_t>(half));
  require(isnan(exact) || static_cast<double>(f16_to_float(half)) == exact, "f16 %04x to float", half);
  require(__byte_perm(0x33221100u, 0x776655ffu, 0xc704u) == 0xff7700ffu, "__byte_perm");
}

struct Nothing {};

// What a kernel must not do, and a part of the line that says so.
struct Fault {
  const char* what;
  void (*launch)();
};

void one_thread_shuffles(Nothing) {
  if (threadIdx.x == 3) __shfl_xor_sync(kAllLanes, 1, 1);
  if (threadIdx.x != 3) __syncthreads();
}
void reads_an_ended_lane(Nothing) {
  if (threadIdx.x == 0) return;
  __shfl_sync(kAllLanes, 1, 0);
}
void not_in_its_mask(Nothing) { __syncwarp(0xfffffffeu); }
void misaligned(Nothing) {
  alignas(16) static unsigned char bytes[32];
  load16(bytes + 8);
}

void arrives_twice(Nothing) {
  cluster_arrive();
  cluster_arrive();
}
void waits_only(Nothing) { cluster_wait(); }
void half_at_another_barrier(Nothing) {
  if (threadIdx.x == 0) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

void exchange(bool meets, bool waits, int missing) {
  static float values[8], sums[8];
  launch_clusters(exchange_kernel, dim3(4), 4, dim3(2), 40, nullptr,
                  Exchange{values, sums, meets, waits, static_cast<uint32_t>(missing)});
}

const Fault kFaults[] = {
    {"waits in __shfl_xor_sync", [] { launch(one_thread_shuffles, dim3(1), dim3(32), 0, nullptr, Nothing{}); }},
    {"reads lane 0, which is not there", [] { launch(reads_an_ended_lane, dim3(1), dim3(32), 0, nullptr, Nothing{}); }},
    {"is not of its own mask", [] { launch(not_in_its_mask, dim3(1), dim3(32), 0, nullptr, Nothing{}); }},
    {"which is no multiple of 16", [] { launch(misaligned, dim3(1), dim3(1), 0, nullptr, Nothing{}); }},
    {"may not have begun", [] { exchange(false, true, 0); }},
    {"has ended", [] { exchange(true, false, 0); }},
    {"expects no more", [] { exchange(true, true, 4); }},
    {"for a mailbox, and nobody comes", [] { exchange(true, true, -4); }},
    {"arrives twice", [] { launch_clusters(arrives_twice, dim3(2), 2, dim3(1), 0, nullptr, Nothing{}); }},
    {"has not arrived", [] { launch_clusters(waits_only, dim3(2), 2, dim3(1), 0, nullptr, Nothing{}); }},
    {"and nobody comes", [] { launch_clusters(half_at_another_barrier, dim3(2), 2, dim3(2), 0, nullptr, Nothing{}); }},
    {"has not waited for its copies",
     [] {
       alignas(16) static float from[8];
       static float early[4], to[8];
       launch(copies_kernel, dim3(1), dim3(1), 32, nullptr, Copies{from, early, to, false});
     }},
};

// In a process of its own; what it wrote to stderr.
std::string dying_words(void (*call)()) {
  int ends[2];
  require(pipe(ends) == 0, "no pipe");
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    emulator::on_error = nullptr;
    call();
    _Exit(0);
  }
  close(ends[1]);
  std::string words;
  char buffer[256];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) words.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  require(WIFEXITED(status) && WEXITSTATUS(status) == 1, "the process did not end with 1, but said: %s", words.c_str());
  return words;
}

void test_faults() {
  for (const Fault& fault : kFaults) {
    const std::string words = dying_words(fault.launch);
    require(words.find(fault.what) != std::string::npos, "expected '%s', not: %s", fault.what, words.c_str());
  }
}

// Without the barrier the first thread is too early, unless it runs last.
void test_a_forgotten_barrier_shows() {
  const std::vector<float> ones(128, 1.0f);
  for (uint64_t schedule : {0, 1}) {
    float sum = 0;
    emulator::schedule = schedule;
    launch(sum_kernel, dim3(1), dim3(128), 0, nullptr, Sums{ones.data(), &sum, false});
    require(schedule == 0 ? isnan(sum) : sum == 128.0f, "the sum is %g", static_cast<double>(sum));
  }
}

void test_limits() {
  const auto kernel = [](Nothing) {};
  require(launch(+kernel, dim3(1), dim3(1025), 0, nullptr, Nothing{}) != 0, "1025 threads");
  require(launch(+kernel, dim3(1, 65536), dim3(1), 0, nullptr, Nothing{}) != 0, "65536 blocks in y");
  require(launch(+kernel, dim3(0), dim3(1), 0, nullptr, Nothing{}) != 0, "no block");
  require(launch_clusters(+kernel, dim3(9), 9, dim3(1), 0, nullptr, Nothing{}) != 0, "clusters of 9");
  require(launch_clusters(+kernel, dim3(9), 2, dim3(1), 0, nullptr, Nothing{}) != 0, "half a cluster");
  require(launch(+kernel, dim3(1), dim3(1), 228 << 10, nullptr, Nothing{}) != 0, "more shared memory than there is");
}

void one(Random& random) {
  test_sums(random);
  test_lanes(random);
  test_clusters(random);
  test_products(random);
  test_copies(random);
  test_numbers(random);
}

}  // namespace

int main(int argc, char** argv) {
  test_faults();
  test_a_forgotten_barrier_shows();
  test_limits();
  return run_emulated(argc, argv, 200, one);
}
