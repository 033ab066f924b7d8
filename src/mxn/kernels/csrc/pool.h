// Threads that share one loop at a time. Whoever is free takes the next item, so a thread that the
// operating system takes off its core delays one item and not the whole loop.
#pragma once
#include <atomic>
#include <cstdint>
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

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(item, thread) for every item in [0, num_items) and returns when all have returned.
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
  bool take(uint32_t round, int64_t* item);
  void take_all(uint32_t round, int thread);

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
  int spin_us_;
  std::vector<std::thread> workers_;
};

}  // namespace mxn
