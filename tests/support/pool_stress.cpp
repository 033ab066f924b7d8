// Drives csrc/pool.cpp alone: pool_stress <mode> <rounds>. Prints what went wrong and exits with 1.
//
// A lost wake-up does not stop a loop, because the caller takes what nobody else takes. `meet` shows it
// anyway: every item waits for all others, so a thread that sleeps on hangs the loop.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

using Clock = std::chrono::steady_clock;

void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

void pause_for(int us) {
  if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

void burn(int us) {
  const auto end = Clock::now() + std::chrono::microseconds(us);
  while (Clock::now() < end) {
  }
}

// Runs one loop; every item must run once, and no two at a time on one thread. The counts are not
// atomic: a sanitizer sees when the end of the loop is not ordered behind its items.
void count_items(mxn::Pool& pool, int64_t num, const std::function<void(int64_t)>& item) {
  std::vector<int> hits(static_cast<size_t>(num), 0);
  std::vector<std::atomic<int>> busy(static_cast<size_t>(pool.num_threads()));
  pool.run(num, [&](int64_t i, int thread) {
    if (i < 0 || i >= num || thread < 0 || thread >= pool.num_threads()) fail("item or thread out of range");
    if (busy[static_cast<size_t>(thread)].exchange(1)) fail("two items at a time on one thread number");
    item(i);
    ++hits[static_cast<size_t>(i)];
    busy[static_cast<size_t>(thread)].store(0);
  });
  for (int count : hits) {
    if (count != 1) fail(count ? "an item ran twice" : "an item was lost");
  }
}

void short_loops(int rounds) {
  for (int threads = 1; threads <= 8; ++threads) {
    for (int spin_us : {0, 50}) {
      mxn::Pool pool(threads, spin_us);
      for (int i = 0; i < rounds; ++i) count_items(pool, i % 37, [](int64_t) {});
    }
  }
}

void uneven(int rounds) {
  for (int threads : {2, 3, 8}) {
    mxn::Pool pool(threads, 20);
    for (int i = 0; i < rounds; ++i) {
      count_items(pool, 12, [&](int64_t item) { burn(item == i % 12 ? 300 : static_cast<int>(item % 3)); });
    }
  }
}

// Pauses about as long as a worker spins, so that loops begin while it goes to sleep.
void meet(int rounds) {
  std::mt19937 random(1);
  for (int threads : {2, 3, 4}) {
    for (int spin_us : {0, 5, 30}) {
      mxn::Pool pool(threads, spin_us);
      pool.keep_late_threads();
      for (int i = 0; i < rounds; ++i) {
        std::atomic<int> arrived{0};
        count_items(pool, threads, [&](int64_t) {
          arrived.fetch_add(1);
          const auto end = Clock::now() + std::chrono::seconds(20);
          while (arrived.load() < threads) {
            if (Clock::now() > end) fail("a thread slept through the loop");
            std::this_thread::yield();
          }
        });
        if (i % 2) pause_for(static_cast<int>(random() % (2 * spin_us + 60)));
        else burn(static_cast<int>(random() % (2 * spin_us + 3)));
      }
    }
  }
}

void destroyed(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    mxn::Pool pool(1 + i % 8, i % 3 * 20);
    if (i % 4) count_items(pool, 9, [](int64_t) {});
    if (i % 5 == 0) pause_for(100);  // asleep by now
  }
}

// Workers bound to cores: one of them shares its core with whatever the test runs there.
void pinned(int rounds) {
  mxn::Pool pool(3, 20, true);
  for (int i = 0; i < rounds; ++i) {
    count_items(pool, 20, [](int64_t) { burn(20); });
    pause_for(i % 3 * 40);
  }
}

// Two requests at a time on one pool: they must take turns.
void callers(int rounds) {
  mxn::Pool pool(3, 20);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < rounds; ++i) count_items(pool, 1 + (i + t) % 9, [](int64_t) {});
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A child has no workers: its loops must end all the same, and so must it.
void forks(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    auto pool = std::make_unique<mxn::Pool>(1 + i % 4, i % 2 * 50);
    count_items(*pool, 9, [](int64_t) {});
    if (i % 3 == 0) pause_for(200);
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      for (int k = 0; k < 20; ++k) count_items(*pool, 11, [](int64_t) {});
      pool.reset();
      std::_Exit(0);
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child || status != 0) fail("the child of a fork did not end well");
    count_items(*pool, 9, [](int64_t) {});
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string mode = argv[1];
  const int rounds = std::atoi(argv[2]);
  if (mode == "short") short_loops(rounds);
  else if (mode == "uneven") uneven(rounds);
  else if (mode == "meet") meet(rounds);
  else if (mode == "destroyed") destroyed(rounds);
  else if (mode == "pinned") pinned(rounds);
  else if (mode == "callers") callers(rounds);
  else if (mode == "forks") forks(rounds);
  else return 2;
  return 0;
}
