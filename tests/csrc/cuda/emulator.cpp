#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include "device.cuh"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulator {

uint64_t schedule = 0;
int multiprocessors = 2;
void (*on_error)() = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kThreads = 1024;
constexpr unsigned kCluster = 8;  // the most blocks that every GPU with clusters takes
constexpr size_t kSharedBytes = 227 << 10;
constexpr size_t kStaticSharedBytes = 48 << 10;
constexpr int kInvalidConfiguration = 9;

enum class State { ready, at_barrier, at_exchange, at_cluster, at_mailbox, ended };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
};

struct Block {
  uint3 index;
  std::map<const void*, std::pair<std::unique_ptr<unsigned char[]>, size_t>> arrays;
  std::unique_ptr<unsigned char[]> dynamic;
  size_t static_bytes;
};

struct Thread {
  State state;
  Block* block;
  size_t number;  // in its block
  uint3 index;
  // How often it has come to the cluster's barrier, and has left it.
  size_t arrivals;
  size_t meetings;
  const uint64_t* box;  // waited for
  // The last exchange: what for, with whom, and what was sent and received.
  const char* what;
  unsigned mask;
  size_t bytes;
  Sent sent;
  unsigned partners;
  const Sent* received;  // of the warp, in `gathered` of one of the partners
  Sent gathered[32];
  std::vector<std::vector<Copy>> copies;  // the last group is open
  unsigned char* stack;
#if defined(__x86_64__)
  void* saved;
#else
  ucontext_t saved;
#endif
  void* fake_stack;
};

std::vector<Thread> threads;
Thread* current = nullptr;
void (*body)(const void*) = nullptr;
const void* context = nullptr;
Block blocks[kCluster];
size_t block_threads = 0;  // of one block
size_t dynamic_bytes = 0;

#if defined(__x86_64__)
void* scheduler;
#else
ucontext_t scheduler;
#endif
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

}  // namespace

#if defined(__x86_64__)
// Saves what the calling convention says a function keeps, and goes on where `to` was saved. No system call, which
// swapcontext makes two of.
extern "C" void emulator_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".type emulator_switch, @function\n"
    "emulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size emulator_switch, . - emulator_switch\n");
#endif

namespace {

// From the scheduler into a thread, until that waits or ends.
void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStack);
#endif
#if defined(__x86_64__)
  emulator_switch(&scheduler, thread.saved);
#else
  swapcontext(&scheduler, &thread.saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

// Back to the scheduler.
void leave(bool ends) {
  Thread& thread = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &thread.fake_stack, scheduler_stack, scheduler_stack_bytes);
#else
  static_cast<void>(ends);
#endif
#if defined(__x86_64__)
  emulator_switch(&thread.saved, scheduler);
#else
  swapcontext(&thread.saved, &scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  body(context);
  for (const std::vector<Copy>& group : current->copies) {
    if (!group.empty()) fail("a thread ends and has not waited for its copies");
  }
  current->state = State::ended;
  leave(true);
}

void prepare(Thread& thread) {
  thread.state = State::ready;
  thread.arrivals = thread.meetings = 0;
  thread.copies.assign(1, {});
  thread.fake_stack = nullptr;
  if (thread.stack == nullptr) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    thread.stack = static_cast<unsigned char*>(stack);
  }
#if defined(__x86_64__)
  // As emulator_switch leaves a stack: six registers, then where to go on, at an address that is a multiple of 16.
  void** top = reinterpret_cast<void**>(thread.stack + kStack) - 8;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&start);
  top[7] = nullptr;
  thread.saved = top;
#else
  getcontext(&thread.saved);
  thread.saved.uc_stack.ss_sp = thread.stack;
  thread.saved.uc_stack.ss_size = kStack;
  thread.saved.uc_link = nullptr;
  makecontext(&thread.saved, start, 0);
#endif
}

std::vector<size_t> order(size_t count, uint64_t& random) {
  std::vector<size_t> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (schedule == 1) std::reverse(indices.begin(), indices.end());
  if (schedule > 1) {
    for (size_t i = count; i > 1; --i) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      std::swap(indices[i - 1], indices[(random >> 33) % i]);
    }
  }
  return indices;
}

// Lets those of a warp go on that wait for the same exchange and for nobody else.
bool finish_exchanges(size_t first, size_t count) {
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[first + i];
    if (thread.state != State::at_exchange) continue;
    unsigned partners = 0;
    bool complete = true;
    for (size_t j = 0; j < 32; ++j) {
      if ((thread.mask >> j & 1u) == 0 || j >= count || threads[first + j].state == State::ended) continue;
      const Thread& other = threads[first + j];
      complete = complete && other.state == State::at_exchange && other.mask == thread.mask &&
                 other.bytes == thread.bytes && strcmp(other.what, thread.what) == 0;
      partners |= 1u << j;
    }
    if (!complete) continue;
    // All of them read it before any of them is here again.
    for (size_t j = 0; j < count; ++j) {
      if ((partners >> j & 1u) == 0) continue;
      Thread& other = threads[first + j];
      if (thread.bytes > 0) memcpy(thread.gathered[j].bytes, other.sent.bytes, thread.bytes);
      other.partners = partners;
      other.received = thread.gathered;
      other.state = State::ready;
    }
    any = true;
  }
  return any;
}

[[noreturn]] void fail_at(const Thread& thread) {
  size_t barrier = 0, exchange = 0, cluster = 0, mailbox = 0, ended = 0;
  const Thread* const first = &thread - thread.number;
  for (const Thread* other = first; other < first + block_threads; ++other) {
    barrier += other->state == State::at_barrier;
    exchange += other->state == State::at_exchange;
    cluster += other->state == State::at_cluster;
    mailbox += other->state == State::at_mailbox;
    ended += other->state == State::ended;
  }
  blockIdx = thread.block->index;
  fail(
      "thread (%u, %u, %u) waits in %s for lanes %08x that do not come: %zu threads wait in __syncthreads, %zu for "
      "their warp, %zu for the cluster, %zu for a mailbox, %zu have ended",
      thread.index.x, thread.index.y, thread.index.z, thread.what, thread.mask, barrier, exchange, cluster, mailbox,
      ended);
}

// Lets the block's threads go on if all that have not ended are at its barrier.
bool finish_barrier(size_t first) {
  size_t waiting = 0, ended = 0;
  for (size_t i = first; i < first + block_threads; ++i) {
    waiting += threads[i].state == State::at_barrier;
    ended += threads[i].state == State::ended;
  }
  if (waiting == 0 || waiting + ended < block_threads) return false;
  for (size_t i = first; i < first + block_threads; ++i) {
    if (threads[i].state == State::at_barrier) threads[i].state = State::ready;
  }
  return true;
}

// Lets those go on for whom all of the cluster that have not ended have come.
bool finish_cluster(size_t count) {
  size_t come = SIZE_MAX;
  for (size_t i = 0; i < count; ++i) {
    if (threads[i].state != State::ended) come = std::min(come, threads[i].arrivals);
  }
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    if (threads[i].state != State::at_cluster || threads[i].meetings >= come) continue;
    ++threads[i].meetings;
    threads[i].state = State::ready;
    any = true;
  }
  return any;
}

bool has_all(uint64_t box) { return box >> 32 == (box & 0xffffffffu); }

// Lets those go on whose mailbox has all it was opened for.
bool finish_mail(size_t count) {
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    if (threads[i].state != State::at_mailbox || !has_all(*threads[i].box)) continue;
    threads[i].state = State::ready;
    any = true;
  }
  return any;
}

void run_cluster(size_t count, uint64_t& random) {
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    prepare(thread);
    thread.block = &blocks[i / block_threads];
    thread.number = i % block_threads;
    const uint32_t n = static_cast<uint32_t>(thread.number);
    thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
  }
  while (true) {
    for (size_t i : order(count, random)) {
      if (threads[i].state == State::ready) resume(threads[i]);
    }
    bool any = false;
    for (size_t block = 0; block < count; block += block_threads) {
      for (size_t first = 0; first < block_threads; first += 32) {
        any = finish_exchanges(block + first, std::min<size_t>(32, block_threads - first)) || any;
      }
      any = finish_barrier(block) || any;
    }
    any = finish_cluster(count) || any;
    any = finish_mail(count) || any;
    size_t ended = 0;
    for (size_t i = 0; i < count; ++i) {
      ended += threads[i].state == State::ended;
      any = any || threads[i].state == State::ready;
    }
    if (ended == count) return;
    for (size_t i = 0; i < count && !any; ++i) {
      if (threads[i].state == State::at_exchange) fail_at(threads[i]);
    }
    if (!any) fail("threads wait in __syncthreads, for the cluster or for a mailbox, and nobody comes");
  }
}

}  // namespace

void fail(const char* format, ...) {
  if (on_error != nullptr) on_error();
  fprintf(stderr, "emulator: block (%u, %u, %u), ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  fflush(stderr);
  _Exit(1);
}

int run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*kernel)(const void*),
        const void* arguments) {
  const uint64_t count = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (count == 0 || count > kThreads || block.z > 64 || grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535 || cluster == 0 || cluster > kCluster || grid.x % cluster != 0) {
    return kInvalidConfiguration;
  }
  if (shared_bytes > kSharedBytes) return personafast::cuda::kInvalidValue;
  if (current != nullptr) fail("a kernel launches a kernel");
  if (threads.size() < count * cluster) threads.resize(count * cluster);
  body = kernel;
  context = arguments;
  gridDim = grid;
  blockDim = block;
  block_threads = count;
  dynamic_bytes = shared_bytes;
  uint64_t random = schedule;
  for (size_t i : order(static_cast<uint64_t>(grid.x) * grid.y * grid.z / cluster, random)) {
    for (unsigned rank = 0; rank < cluster; ++rank) {
      const uint64_t n = i * cluster + rank;
      blocks[rank].index = {static_cast<uint32_t>(n % grid.x), static_cast<uint32_t>(n / grid.x % grid.y),
                            static_cast<uint32_t>(n / grid.x / grid.y)};
      blocks[rank].dynamic.reset(new unsigned char[shared_bytes]);
      memset(blocks[rank].dynamic.get(), 0xff, shared_bytes);
    }
    run_cluster(count * cluster, random);
    for (Block& done : blocks) {
      done.arrays.clear();
      done.static_bytes = 0;
      done.dynamic.reset();
    }
  }
  current = nullptr;
  return 0;
}

const Sent* exchange(unsigned mask, const char* what, const void* sent, size_t bytes) {
  Thread& thread = *current;
  if ((mask >> lane() & 1u) == 0) fail("%s: lane %u is not of its own mask %08x", what, lane(), mask);
  thread.state = State::at_exchange;
  thread.what = what;
  thread.mask = mask;
  thread.bytes = bytes;
  if (bytes > 0) memcpy(thread.sent.bytes, sent, bytes);
  leave(false);
  return thread.received;
}

void barrier() {
  current->state = State::at_barrier;
  leave(false);
}

void cluster_arrive() {
  if (current->arrivals != current->meetings) fail("a thread arrives twice at the cluster's barrier");
  ++current->arrivals;
}

void cluster_wait() {
  if (current->arrivals == current->meetings) fail("a thread waits for the cluster, but has not arrived");
  current->state = State::at_cluster;
  leave(false);
}

unsigned lane() { return static_cast<unsigned>(current->number) % 32; }

unsigned partners() { return current->partners; }

void* shared(const void* key, size_t bytes) {
  auto& [array, size] = current->block->arrays[key];
  if (array == nullptr) {
    array.reset(new unsigned char[bytes]);
    memset(array.get(), 0xff, bytes);
    size = bytes;
    current->block->static_bytes += bytes;
    if (current->block->static_bytes > kStaticSharedBytes) {
      fail("%zu bytes of static shared memory", current->block->static_bytes);
    }
  }
  if (size != bytes) fail("one shared array of two sizes");
  return array.get();
}

void* dynamic_shared() { return current->block->dynamic.get(); }

void* remote(void* at, size_t bytes, unsigned rank) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(dynamic_shared());
  if (offset + bytes > dynamic_bytes) fail("an address of another block that is outside its shared memory");
  if (rank >= kCluster || blocks[rank].dynamic == nullptr) fail("the cluster has no block %u", rank);
  if (current->meetings == 0) fail("block %u of the cluster is sent to, and may not have begun", rank);
  const Thread* const first = threads.data() + rank * block_threads;
  if (std::all_of(first, first + block_threads, [](const Thread& thread) { return thread.state == State::ended; })) {
    fail("block %u of the cluster is sent to, and has ended", rank);
  }
  return blocks[rank].dynamic.get() + offset;
}

void count_mail(uint64_t* box, size_t bytes) {
  if (*box == ~uint64_t{0}) fail("a mailbox that nobody has opened");
  if (has_all(*box)) fail("a mailbox that expects no more");
  *box += static_cast<uint64_t>(bytes) << 32;
}

void wait_for_mail(const uint64_t* box) {
  current->box = box;
  current->state = State::at_mailbox;
  leave(false);
}

void copy_async(void* to, const void* from, size_t bytes) {
  current->copies.back().push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes});
}

void copies_commit() { current->copies.emplace_back(); }

// The open group is not waited for, as on a GPU.
void copies_wait(size_t pending) {
  std::vector<std::vector<Copy>>& copies = current->copies;
  while (copies.size() > pending + 1) {
    for (const Copy& copy : copies.front()) memcpy(copy.to, copy.from, copy.bytes);
    copies.erase(copies.begin());
  }
}

}  // namespace emulator

namespace personafast::cuda {
namespace {

uint32_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

uint32_t to_f16(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  if (value != value) return 0x7fffu;
  const float size = fabsf(value);
  if (size >= 65520.0f) return sign | 0x7c00u;
  int exponent = 0;
  frexpf(size, &exponent);
  const int last = std::max(exponent - 11, -24);  // the place of the last bit
  const float units = nearbyintf(ldexpf(size, -last));
  return size == 0.0f ? sign : sign + static_cast<uint32_t>((last + 24) * 1024 + static_cast<int>(units));
}

template <class ToFloat>
void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToFloat to_float) {
  struct Parts {
    uint32_t a[4];
    uint32_t b[2];
  } parts;
  memcpy(parts.a, a, sizeof(a));
  memcpy(parts.b, b, sizeof(b));
  const emulator::Sent* sent = emulator::exchange(kAllLanes, what, &parts, sizeof(parts));
  if (emulator::partners() != kAllLanes) emulator::fail("%s: some lanes have ended", what);
  float rows[16][16], columns[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    memcpy(&parts, sent[lane].bytes, sizeof(parts));
    const int g = lane / 4, c = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        rows[g + i % 2 * 8][2 * c + i / 2 * 8 + half] = to_float(parts.a[i] >> (16 * half) & 0xffffu);
      }
      for (int i = 0; i < 2; ++i) columns[g][2 * c + 8 * i + half] = to_float(parts.b[i] >> (16 * half) & 0xffffu);
    }
  }
  const int g = static_cast<int>(emulator::lane()) / 4, c = static_cast<int>(emulator::lane()) % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = static_cast<double>(d[i]);
    for (int k = 0; k < 16; ++k) {
      sum += static_cast<double>(rows[g + i / 2 * 8][k]) * static_cast<double>(columns[2 * c + i % 2][k]);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace

float f16_to_float(uint32_t low_bits) {
  const int exponent = static_cast<int>(low_bits >> 10 & 31u);
  const int fraction = static_cast<int>(low_bits & 1023u);
  float size = exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                             : ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) size = fraction ? NAN : HUGE_VALF;
  return low_bits & 0x8000u ? -size : size;
}

uint32_t floats_to_bf16x2(float low, float high) { return to_bf16(high) << 16 | to_bf16(low); }

uint32_t floats_to_f16x2(float low, float high) { return to_f16(high) << 16 | to_f16(low); }

// A product of two such numbers is an fp32 number, so that the sum is rounded twice: to fp32 first.
uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return floats_to_bf16x2(fmaf(bf16_to_float(a & 0xffffu), bf16_to_float(b & 0xffffu), bf16_to_float(c & 0xffffu)),
                          fmaf(bf16_to_float(a >> 16), bf16_to_float(b >> 16), bf16_to_float(c >> 16)));
}

uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return floats_to_f16x2(fmaf(f16_to_float(a & 0xffffu), f16_to_float(b & 0xffffu), f16_to_float(c & 0xffffu)),
                         fmaf(f16_to_float(a >> 16), f16_to_float(b >> 16), f16_to_float(c >> 16)));
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma("mma_bf16", d, a, b, [](uint32_t bits) { return bf16_to_float(bits); });
}

void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma("mma_f16", d, a, b, [](uint32_t bits) { return f16_to_float(bits); });
}

int multiprocessors() { return emulator::multiprocessors; }

}  // namespace personafast::cuda
