// The simulated chip: torch devices that live in host memory but refuse to be taken for the CPU.
//
// What the files share. Start reading at fallback.cpp, where an operator runs.
//   knobs.cpp        what a test may turn: slow, flaky, small, poisoned
//   memory.cpp       allocator, memory cap and statistics of each device; pinned host memory
//   runtime.cpp      current device, streams, events, generators: what torch asks of a device type
//   fallback.cpp     runs an operator on the CPU kernels without copying, and checks devices
//   operators.cpp    the few operators that need code of their own: empty, views, copies
//   autocast.cpp     dtypes under torch.autocast
//   collectives.cpp  a collective backend over gloo
//   bind.cpp         what Python sees
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace c10 {
class OperatorHandle;
}

namespace mxn::sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 64;  // more than any node holds; fixes the size of the tables

// ---- knobs.cpp

// Read by every operator, so plain atomics: a torn set of knobs for one operator does no harm.
struct Knobs {
  std::atomic<double> launch_us{0};          // added to each operator
  std::atomic<double> slow_factor{1};        // an operator takes this many times its CPU time
  std::atomic<double> link_bytes_per_s{0};   // host and peer copies; 0 = as fast as memory
  std::atomic<int64_t> fail_countdown{0};    // the operator that takes it from 1 to 0 fails
  std::atomic<bool> fail_forever{false};     // what has failed once keeps failing
  std::atomic<bool> has_failed{false};
  std::atomic<bool> poison{false};           // fill new memory with NaN
};
extern Knobs knobs;

// Arms the fault: the n-th operator from now on fails; 0 disarms and heals.
void set_fail_after(int64_t n, bool forever);

// One operator or copy under way: counts it, may fail it, and makes it as slow as the knobs say.
class Launch {
 public:
  Launch(const std::string& name, int device);
  ~Launch();  // waits; nothing is added when the operator threw
  void add_copy_bytes(int64_t num_bytes) { copy_bytes_ += num_bytes; }

 private:
  int64_t start_ns_;
  int64_t copy_bytes_ = 0;
  int num_exceptions_;
};

std::unordered_map<std::string, int64_t> operator_counts();
void reset_operator_counts();

enum class CopyKind { kHostToDevice, kDeviceToHost, kDeviceToDevice, kOnDevice };
constexpr int kNumCopyKinds = 4;
void count_copy(CopyKind kind, int64_t num_bytes);
std::unordered_map<std::string, std::pair<int64_t, int64_t>> copy_counts();  // count, bytes
void reset_copy_counts();

// ---- memory.cpp

void set_memory_bytes(int device, int64_t num_bytes);
int64_t memory_bytes(int device);
int64_t bytes_now(int device);
int64_t bytes_peak(int device);
void reset_peak(int device);
c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* ptr);

// Wraps memory that a CPU kernel allocated, charging it to the device for as long as it lives.
c10::Storage adopt_storage(const c10::Storage& cpu_storage, int device);

// ---- runtime.cpp

void configure(int num_devices, int64_t num_bytes);
int num_devices();
int current_device();
void set_device(int device);
const at::Generator& default_generator(int device);
at::Generator cpu_generator_of(const at::Generator& sim_generator);

// ---- fallback.cpp

inline bool is_sim(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kSim;
}

// A CPU tensor over the same memory; keeps the device memory alive. Others pass unchanged.
at::Tensor cpu_alias(const at::Tensor& tensor);

void run_on_cpu(const c10::OperatorHandle& op, std::vector<c10::IValue>* stack);

}  // namespace mxn::sim
