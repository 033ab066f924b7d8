// Faults, slowness and counters. Knows nothing of tensors.
#include "sim.h"

#include <c10/util/Exception.h>

#include <array>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>

namespace mxn::sim {

Knobs knobs;

namespace {

// The code that CUDA reports for an unspecified launch failure, so that callers see a known one.
constexpr int32_t kLaunchFailure = 719;

// Below this a sleep is mostly scheduler noise, so the time is spun away.
constexpr int64_t kShortestSleepNs = 100'000;

std::mutex counts_mutex;
std::unordered_map<std::string, int64_t> counts;

struct CopyCount {
  std::atomic<int64_t> num{0};
  std::atomic<int64_t> bytes{0};
};
std::array<CopyCount, kNumCopyKinds> copies;
constexpr std::array<const char*, kNumCopyKinds> kCopyNames = {"h2d", "d2h", "d2d", "on_device"};

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void wait_until(int64_t deadline_ns) {
  for (int64_t left = deadline_ns - now_ns(); left > 0; left = deadline_ns - now_ns()) {
    if (left > kShortestSleepNs) {
      std::this_thread::sleep_for(std::chrono::nanoseconds(left));
    }
  }
}

bool takes_the_fault() {
  if (knobs.has_failed && knobs.fail_forever) {
    return true;
  }
  // Plain load first: the countdown is off nearly always and must not bounce between threads.
  return knobs.fail_countdown > 0 && knobs.fail_countdown.fetch_sub(1) == 1;
}

void fail(const std::string& name, int device) {
  knobs.has_failed = true;
  throw c10::AcceleratorError(
      {__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, kLaunchFailure,
      c10::str("simulated chip failure on sim:", device, " in operator ", name,
               " (knob fail_after, MXN_SIM_FAIL_AFTER)"));
}

}  // namespace

void set_fail_after(int64_t n, bool forever) {
  knobs.has_failed = false;
  knobs.fail_forever = forever;
  knobs.fail_countdown = n;
}

Launch::Launch(const std::string& name, int device)
    : start_ns_(now_ns()), num_exceptions_(std::uncaught_exceptions()) {
  {
    std::lock_guard<std::mutex> lock(counts_mutex);
    ++counts[name];
  }
  if (takes_the_fault()) {
    fail(name, device);
  }
}

Launch::~Launch() {
  const double launch_us = knobs.launch_us;
  const double factor = knobs.slow_factor;
  const double link = copy_bytes_ > 0 ? knobs.link_bytes_per_s.load() : 0;
  if ((launch_us <= 0 && factor <= 1 && link <= 0) ||
      std::uncaught_exceptions() > num_exceptions_) {
    return;
  }
  double work_ns = static_cast<double>(now_ns() - start_ns_) * factor;
  if (link > 0) {
    work_ns = std::max(work_ns, 1e9 * static_cast<double>(copy_bytes_) / link);
  }
  wait_until(start_ns_ + static_cast<int64_t>(work_ns + 1e3 * launch_us));
}

std::unordered_map<std::string, int64_t> operator_counts() {
  std::lock_guard<std::mutex> lock(counts_mutex);
  return counts;
}

void reset_operator_counts() {
  std::lock_guard<std::mutex> lock(counts_mutex);
  counts.clear();
}

void count_copy(CopyKind kind, int64_t num_bytes) {
  auto& copy = copies[static_cast<int>(kind)];
  ++copy.num;
  copy.bytes += num_bytes;
}

std::unordered_map<std::string, std::pair<int64_t, int64_t>> copy_counts() {
  std::unordered_map<std::string, std::pair<int64_t, int64_t>> out;
  for (int i = 0; i < kNumCopyKinds; ++i) {
    out[kCopyNames[i]] = {copies[i].num, copies[i].bytes};
  }
  return out;
}

void reset_copy_counts() {
  for (auto& copy : copies) {
    copy.num = 0;
    copy.bytes = 0;
  }
}

}  // namespace mxn::sim
