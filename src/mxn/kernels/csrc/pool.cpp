#include "pool.h"

#include <chrono>
#include <memory>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mxn {
namespace {

constexpr uint32_t kClosed = 0xFFFFFFFFu;  // next item of a loop that is being set up

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int64_t kPatienceNs = 500'000;       // beyond some times the length of an item
constexpr int64_t kPatienceItems = 4;
constexpr int64_t kFirstRestNs = 40'000'000;   // doubled while a thread is late again at once
constexpr int64_t kLongestRestNs = 640'000'000;
constexpr int64_t kLongestNapNs = 50'000'000;  // so that the end of the pool is seen
constexpr int64_t kSameNs = 1'000'000;         // within it, it is one and the same delay
constexpr int64_t kOftenNs = 60'000'000;       // three delays within it are a core lost
constexpr int64_t kForgottenNs = 1'000'000'000;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Binds the calling thread to the n-th of the cores that this process may use.
void pin(int n) {
#if defined(__linux__)
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  const int count = CPU_COUNT(&allowed);
  int seen = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    if (seen++ != n % count) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
#else
  (void)n;
#endif
}

int64_t this_process() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 0;
#endif
}

}  // namespace

Pool::Pool(int num_threads, int spin_us, bool is_pinned)
    : spin_us_(spin_us), process_(this_process()), seats_(new Seat[static_cast<size_t>(num_threads > 0 ? num_threads : 1)]) {
  try {
    for (int thread = 1; thread < num_threads; ++thread) {
      workers_.emplace_back([this, thread, is_pinned] {
        if (is_pinned) pin(thread);
        work(thread);
      });
    }
  } catch (...) {  // too many for the system; a running thread must not be destroyed
    stop();
    throw;
  }
}

Pool::~Pool() {
  if (this_process() != process_) {
    // Threads do not survive a fork; joining what is left of them would end the process.
    static_cast<void>(std::make_unique<std::vector<std::thread>>(std::move(workers_)).release());
    return;
  }
  stop();
}

void Pool::stop() {
  is_ending_.store(true);
  wake_.fetch_add(1);
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::take(uint32_t round, int64_t* item) {
  uint64_t now = state_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(now >> 32) == round) {
    const int64_t next = static_cast<int64_t>(now & 0xFFFFFFFFu);
    if (next >= num_items_.load(std::memory_order_relaxed)) return false;
    if (state_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
      *item = next;
      return true;
    }
  }
  return false;
}

// Returns how many items this thread took.
int64_t Pool::take_all(uint32_t round, int thread) {
  Seat& seat = seats_[static_cast<size_t>(thread)];
  int64_t item, count = 0;
  seat.round.store(round, std::memory_order_relaxed);
  // Holding an item keeps the loop open, so what it calls is still this loop's.
  while (take(round, &item)) {
    call_.load(std::memory_order_relaxed)(fn_.load(std::memory_order_relaxed), item, thread);
    num_done_.fetch_add(1, std::memory_order_release);
    ++count;
  }
  seat.round.store(0, std::memory_order_relaxed);
  return count;
}

// Being late once is no reason: every thread is interrupted now and then.
void Pool::note_late(int thread, int64_t now) {
  Seat& seat = seats_[static_cast<size_t>(thread)];
  if (now - seat.late_ns[1] < kSameNs) return;
  const bool is_usual = now - seat.late_ns[0] < kOftenNs;
  seat.late_ns[0] = seat.late_ns[1];
  seat.late_ns[1] = now;
  if (is_usual) rest(thread, now);
}

void Pool::rest(int thread, int64_t now) {
  Seat& seat = seats_[static_cast<size_t>(thread)];
  const bool is_again = now - seat.rested_ns < seat.penalty_ns + kForgottenNs;
  const int64_t next = is_again ? 2 * seat.penalty_ns : kFirstRestNs;
  seat.penalty_ns = next < kFirstRestNs ? kFirstRestNs : next > kLongestRestNs ? kLongestRestNs : next;
  seat.rested_ns = now;
  seat.rests_until.store(now + seat.penalty_ns, std::memory_order_relaxed);
  num_rests_.fetch_add(1, std::memory_order_relaxed);
}

void Pool::wait_for_others(uint32_t round, int64_t num_items, int64_t item_ns) {
  const int64_t began = now_ns(), patience = kPatienceNs + kPatienceItems * item_ns;
  for (int turn = 0; num_done_.load(std::memory_order_acquire) < num_items; ++turn) {
    relax();
    if (turn % 256 != 255 || is_patient_) continue;
    const int64_t now = now_ns();
    if (now - began < patience) continue;
    for (int thread = 1; thread < num_threads(); ++thread) {
      Seat& seat = seats_[static_cast<size_t>(thread)];
      const bool is_late = seat.round.load(std::memory_order_relaxed) == round;
      if (is_late && seat.rests_until.load(std::memory_order_relaxed) < now) note_late(thread, now);
    }
  }
}

void Pool::run_items(int64_t num_items, Call call, const void* fn) {
  if (is_taken_.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < num_items; ++i) call(fn, i, 0);
    return;
  }
  const uint32_t round = static_cast<uint32_t>(state_.load(std::memory_order_relaxed) >> 32) + 1;
  // Close the old loop before its facts change: a late thread must find no item under its number.
  state_.store((uint64_t{round} << 32) | kClosed, std::memory_order_seq_cst);
  num_items_.store(num_items, std::memory_order_relaxed);
  call_.store(call, std::memory_order_relaxed);
  fn_.store(fn, std::memory_order_relaxed);
  num_done_.store(0, std::memory_order_relaxed);
  state_.store(uint64_t{round} << 32, std::memory_order_seq_cst);
  if (num_asleep_.load(std::memory_order_seq_cst) > 0) {
    wake_.fetch_add(1, std::memory_order_seq_cst);
    wake_.notify_all();
  }
  const int64_t began = now_ns();
  const int64_t count = take_all(round, 0);
  if (num_done_.load(std::memory_order_acquire) < num_items) {
    wait_for_others(round, num_items, count ? (now_ns() - began) / count : 0);
  }
  is_taken_.store(false, std::memory_order_release);
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  while (!is_ending_.load(std::memory_order_relaxed)) {
    const auto began = std::chrono::steady_clock::now();
    uint32_t round = seen;
    for (int turn = 0; round == seen; ++turn) {
      relax();
      const uint64_t now = state_.load(std::memory_order_acquire);
      if (static_cast<uint32_t>(now) != kClosed) round = static_cast<uint32_t>(now >> 32);
      if (turn % 64 == 63 && std::chrono::steady_clock::now() - began > std::chrono::microseconds(spin_us_)) break;
    }
    if (round != seen) {
      seen = round;
      const int64_t until = seats_[static_cast<size_t>(thread)].rests_until.load(std::memory_order_relaxed);
      const int64_t left = until ? until - now_ns() : 0;
      if (left > 0) {
        std::this_thread::sleep_for(std::chrono::nanoseconds(left < kLongestNapNs ? left : kLongestNapNs));
      } else {
        take_all(round, thread);
      }
      continue;
    }
    const uint32_t ticket = wake_.load(std::memory_order_seq_cst);
    num_asleep_.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t now = state_.load(std::memory_order_seq_cst);
    const bool is_idle = static_cast<uint32_t>(now >> 32) == seen;
    if (is_idle && !is_ending_.load()) wake_.wait(ticket);
    num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace mxn
