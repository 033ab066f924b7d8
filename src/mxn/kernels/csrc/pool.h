// Threads that share one loop at a time. Whoever is free takes the next item, so a thread that the
// operating system takes off its core delays one item and not the whole loop. A thread that keeps the
// others waiting for longer than its item can take has lost its core to another process: it rests for a
// while, and the others go on without it.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace mxn {

class Pool {
 public:
  // `num_threads` counts the caller. `spin_us`: how long an idle worker looks for work before it sleeps.
  explicit Pool(int num_threads, int spin_us = 200, bool is_pinned = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // For loops whose items wait for each other: a late thread keeps its place.
  void keep_late_threads() { is_patient_ = true; }
  // How often a thread was sent to rest, since the start.
  int64_t num_rests() const { return num_rests_.load(std::memory_order_relaxed); }
  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(item, thread) for every item in [0, num_items) and returns when all have returned. A call
  // while another one runs does its items alone, as thread 0; so does the child of a fork, whose
  // workers do not exist.
  template <typename Fn>
  void run(int64_t num_items, const Fn& fn) {
    if (num_items == 1 || workers_.empty()) {
      for (int64_t i = 0; i < num_items; ++i) fn(i, 0);
      return;
    }
    if (num_items > 0) {
      run_items(num_items, [](const void* f, int64_t item, int thread) {
        (*static_cast<const Fn*>(f))(item, thread);
      }, &fn);
    }
  }

 private:
  using Call = void (*)(const void*, int64_t item, int thread);
  void run_items(int64_t num_items, Call call, const void* fn);
  void work(int thread);
  void stop();
  bool take(uint32_t round, int64_t* item);
  int64_t take_all(uint32_t round, int thread);
  void wait_for_others(uint32_t round, int64_t num_items, int64_t item_ns);
  void note_late(int thread, int64_t now_ns);
  void rest(int thread, int64_t now_ns);

  // High half: the loop's number; low half: its next item. One word, so that a thread that slept
  // through a loop cannot take an item of another.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<int64_t> num_items_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> fn_{nullptr};
  alignas(64) std::atomic<uint32_t> wake_{0};
  std::atomic<int> num_asleep_{0};
  std::atomic<bool> is_ending_{false};
  std::atomic<bool> is_taken_{false};
  std::atomic<int64_t> num_rests_{0};
  bool is_patient_ = false;
  int spin_us_;
  int64_t process_;
  struct alignas(64) Seat {
    std::atomic<uint32_t> round{0};     // of the loop whose item it holds; 0: none
    std::atomic<int64_t> rests_until{0};  // ns
    int64_t penalty_ns = 0;             // of its last rest; only the caller's thread touches it
    int64_t rested_ns = 0;
    int64_t late_ns[2] = {0, 0};        // when it was late the last times
  };
  std::unique_ptr<Seat[]> seats_;
  std::vector<std::thread> workers_;
};

}  // namespace mxn
