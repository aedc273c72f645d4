#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.h"
#include "pool.h"

using namespace check;

template <class Run>
static void run_all(int64_t parts, int threads, Run run) {
  personafast::run_parts(
      parts, threads, [](void* context, int64_t part) { (*static_cast<Run*>(context))(part); }, &run);
}

static void rest(int64_t microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

// Plain counts: ThreadSanitizer sees two threads in one part, and a part that is not over when the call returns.
static void require_each_once(int64_t parts, int threads) {
  std::vector<int> counts(static_cast<size_t>(parts));
  std::atomic<int> running{0};
  run_all(parts, threads, [&](int64_t part) {
    require(part >= 0 && part < parts, "part %lld of %lld", static_cast<long long>(part),
            static_cast<long long>(parts));
    const int others = running++;
    require(others == 0 || others < threads, "%d parts at once with %d threads", others + 1, threads);
    ++counts[static_cast<size_t>(part)];
    --running;
  });
  for (int64_t part = 0; part < parts; ++part) {
    require(counts[static_cast<size_t>(part)] == 1, "part %lld of %lld ran %d times with %d threads",
            static_cast<long long>(part), static_cast<long long>(parts), counts[static_cast<size_t>(part)], threads);
  }
}

// As many parts as threads, none of which ends before all have begun: every worker has to come, even from its sleep.
static void require_all_come(int threads) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> begun{0};
  const auto until = Clock::now() + std::chrono::seconds(30);
  run_all(threads, threads, [&](int64_t) {
    for (++begun; begun.load() < threads; sched_yield()) {
      require(Clock::now() < until, "%d threads of %d came", begun.load(), threads);
    }
  });
}

// Runs `child` in a forked process, which has to end well. ThreadSanitizer knows no threads in a forked process.
template <class Run>
static void in_child(Run child) {
#ifdef __SANITIZE_THREAD__
  if (sizeof(child) > 0) return;
#endif
  const pid_t process = fork();
  require(process >= 0, "no process to be had");
  if (process == 0) {
    child();
    _exit(0);
  }
  int status = -1;
  require(waitpid(process, &status, 0) == process && status == 0, "the child ended with status %d", status);
}

static void every_part_once() {
  for (int64_t parts = 0; parts <= 200; ++parts) {
    for (int threads = 1; threads <= 9; ++threads) require_each_once(parts, threads);
  }
  require_each_once(3, 0);
  require_each_once(3, -1);
}

// A thread with a stack of this size cannot be created. First of all, while there is none yet.
static void without_threads() {
  pthread_attr_t usual, absurd;
  require(pthread_getattr_default_np(&usual) == 0 && pthread_attr_init(&absurd) == 0, "no attributes");
  require(pthread_attr_setstacksize(&absurd, size_t{1} << 46) == 0, "no such stack");
  require(pthread_setattr_default_np(&absurd) == 0, "no such default");
  std::atomic<int> others{0};
  const auto self = std::this_thread::get_id();
  run_all(40, 4, [&](int64_t) { others += std::this_thread::get_id() != self; });
  require_each_once(40, 4);
  require(others.load() == 0, "there are threads that could not be created");
  require(pthread_setattr_default_np(&usual) == 0, "no such default");
  pthread_attr_destroy(&usual);
  pthread_attr_destroy(&absurd);
  require_all_come(4);
}

static void several_callers() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([caller] {
      for (int call = 0; call < 300; ++call) require_each_once(call % 23, 2 + caller);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

static void nested() {
  std::vector<int> counts(20 * 30);
  run_all(20, 4, [&](int64_t outer) {
    run_all(30, 4, [&](int64_t inner) { ++counts[static_cast<size_t>(outer * 30 + inner)]; });
  });
  for (const int count : counts) require(count == 1, "an inner part ran %d times", count);
  require_all_come(3);
}

static void exceptions(Random& random) {
  const int64_t parts = random.between(1, 40);
  const int threads = static_cast<int>(random.between(1, 5));
  const int64_t bad = random.between(0, parts - 1);
  const bool all = random.chance(30);
  const int64_t pause = random.between(0, 20);
  std::vector<int> counts(static_cast<size_t>(parts));
  std::string caught;
  try {
    run_all(parts, threads, [&](int64_t part) {
      ++counts[static_cast<size_t>(part)];
      rest(pause);
      if (all || part == bad) throw std::runtime_error("part " + std::to_string(part));
    });
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  require(all ? caught.rfind("part ", 0) == 0 : caught == "part " + std::to_string(bad),
          "part %lld threw, the call \"%s\"", static_cast<long long>(bad), caught.c_str());
  int begun = 0;
  for (const int count : counts) {
    require(count <= 1, "a part ran %d times", count);
    begun += count;
  }
  require(!all || begun <= threads, "%d parts ran although the first of each thread threw", begun);
  require_each_once(parts, threads);
}

static void exception_of_a_worker() {
  const auto self = std::this_thread::get_id();
  std::atomic<bool> thrown{false};
  bool caught = false;
  try {
    run_all(2, 2, [&](int64_t) {
      if (std::this_thread::get_id() != self) {
        thrown = true;
        throw std::bad_alloc();
      }
      while (!thrown.load()) sched_yield();
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  require(caught, "what a worker threw is lost");
}

static void exception_ends_the_call() {
  std::atomic<int> begun{0};
  try {
    run_all(1000, 2, [&](int64_t) {
      if (begun++ == 0) throw std::runtime_error("the first");
      rest(1000);
    });
    require(false, "the call did not throw");
  } catch (const std::runtime_error&) {
    require(begun.load() < 500, "%d parts of 1000 ran after the first threw", begun.load());
  }
}

static void forks() {
  require_all_come(3);
  in_child([] {
    require_all_come(4);
    require_each_once(50, 4);
    in_child([] { require_all_come(2); });
  });
  // While another thread's call is under way, and its workers with it.
  std::atomic<bool> begun{false}, over{false};
  std::thread caller([&] {
    run_all(3, 3, [&](int64_t) {
      begun = true;
      while (!over.load()) sched_yield();
    });
  });
  while (!begun.load()) sched_yield();
  in_child([] { require_all_come(3); });
  over = true;
  caller.join();
  require_all_come(3);
}

// A child has a pool of its own, which reads the setting again.
static void settings() {
  for (const char* spin : {"soon", "-1", "1000000001", "5us", "99999999999999999999"}) {
    in_child([spin] {
      setenv("PERSONAFAST_SPIN_US", spin, 1);
      require_each_once(5, 1);
      std::string caught;
      try {
        require_each_once(5, 2);
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      const std::string expected = std::string("PERSONAFAST_SPIN_US=") + spin + ": expected microseconds";
      require(caught.rfind(expected, 0) == 0, "%s gives \"%s\"", spin, caught.c_str());
    });
  }
  for (const char* spin : {"", "0", "7", "1000000000"}) {
    in_child([spin] {
      setenv("PERSONAFAST_SPIN_US", spin, 1);
      require_all_come(3);
      rest(300);
      require_all_come(3);
    });
  }
}

// Calls back to back, and others after pauses about as long as a worker watches.
static void one(Random& random) {
  if (current_case == 0) {
    without_threads();
    every_part_once();
    several_callers();
    nested();
    exception_of_a_worker();
    exception_ends_the_call();
    forks();
    settings();
  }
  for (int call = 0; call < 20; ++call) {
    require_each_once(random.between(0, 12), static_cast<int>(random.between(1, 6)));
    require_all_come(static_cast<int>(random.between(1, 4)));
    if (random.chance(30)) rest(random.between(0, 200));
  }
  exceptions(random);
}

int main(int argc, char** argv) { return run(argc, argv, 200, one); }
