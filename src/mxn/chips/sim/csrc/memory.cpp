// Device memory: host memory that is charged to a device, with a cap like a real chip has.
#include "sim.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace mxn::sim {
namespace {

constexpr size_t kAlignment = 64;  // a cache line, what the CPU kernels like best
constexpr int kPoisonByte = 0xFF;  // makes every float format a NaN and every integer -1

struct DeviceMemory {
  std::atomic<int64_t> capacity{0};
  std::atomic<int64_t> now{0};
  std::atomic<int64_t> peak{0};
  std::atomic<int64_t> total{0};        // ever allocated
  std::atomic<int64_t> total_freed{0};
  std::atomic<int64_t> num_blocks{0};
  std::atomic<int64_t> num_ooms{0};
};
std::array<DeviceMemory, kMaxDevices> memories;

void throw_out_of_memory(int device, int64_t num_bytes, int64_t used) {
  auto& memory = memories[device];
  ++memory.num_ooms;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, "sim out of memory. Tried to allocate ", num_bytes,
      " bytes. Device ", device, " has a total capacity of ", memory.capacity.load(),
      " bytes of which ", memory.capacity - used, " are free (knob memory_bytes, MXN_SIM_MEMORY)");
}

void charge(int device, int64_t num_bytes) {
  auto& memory = memories[device];
  const int64_t used = memory.now.fetch_add(num_bytes);
  if (used + num_bytes > memory.capacity) {
    memory.now -= num_bytes;
    throw_out_of_memory(device, num_bytes, used);
  }
  memory.total += num_bytes;
  ++memory.num_blocks;
  int64_t peak = memory.peak;
  while (used + num_bytes > peak && !memory.peak.compare_exchange_weak(peak, used + num_bytes)) {
  }
}

void release(int device, int64_t num_bytes) {
  auto& memory = memories[device];
  memory.now -= num_bytes;
  memory.total_freed += num_bytes;
  --memory.num_blocks;
}

// What a DataPtr of the device owns: memory of its own, or a CPU storage it keeps alive.
struct Block {
  void* ptr;
  int64_t num_bytes;
  int device;
  c10::Storage adopted;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  release(block->device, block->num_bytes);
  if (!block->adopted) {
    std::free(block->ptr);
  }
  delete block;
}

struct SimAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    const int device = current_device();
    const c10::Device where(kSim, static_cast<c10::DeviceIndex>(device));
    if (num_bytes == 0) {
      return {nullptr, where};
    }
    charge(device, static_cast<int64_t>(num_bytes));
    void* ptr = nullptr;
    if (posix_memalign(&ptr, kAlignment, num_bytes) != 0) {
      release(device, static_cast<int64_t>(num_bytes));
      throw_out_of_memory(device, static_cast<int64_t>(num_bytes), bytes_now(device));
    }
    if (knobs.poison) {
      std::memset(ptr, kPoisonByte, num_bytes);
    }
    auto* block = new Block{ptr, static_cast<int64_t>(num_bytes), device, {}};
    return {ptr, block, &free_block, where};
  }

  // The pointer alone does not say how much to give back, so the raw interface is not offered.
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, size_t num_bytes) const override {
    default_copy_data(dest, src, num_bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}  // nothing is cached: freed means free
  void recordStream(const c10::DataPtr&, c10::Stream) override {}  // operators are synchronous

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    const auto& memory = memories.at(device);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                        &stats.requested_bytes}) {
      (*bytes)[0].current = memory.now;
      (*bytes)[0].peak = memory.peak;
      (*bytes)[0].allocated = memory.total;
      (*bytes)[0].freed = memory.total_freed;
    }
    stats.allocation[0].current = memory.num_blocks;
    stats.num_ooms = memory.num_ooms;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    memories.at(device).total = 0;
    memories.at(device).total_freed = 0;
  }
  void resetPeakStats(c10::DeviceIndex device) override { reset_peak(device); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const auto& memory = memories.at(device);
    const int64_t free_bytes = std::max<int64_t>(0, memory.capacity - memory.now);
    return {static_cast<size_t>(free_bytes), static_cast<size_t>(memory.capacity.load())};
  }
};
SimAllocator sim_allocator;
REGISTER_ALLOCATOR(kSim, &sim_allocator);

// Pinned memory is CPU memory that remembers it is pinned, so that `is_pinned` tells the truth.
std::mutex pinned_mutex;
std::map<const char*, size_t> pinned_blocks;  // start -> bytes

void free_pinned(void* ptr) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned_blocks.erase(static_cast<const char*>(ptr));
  }
  std::free(ptr);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* ptr = nullptr;
    if (num_bytes > 0) {
      TORCH_CHECK(posix_memalign(&ptr, kAlignment, num_bytes) == 0,
                  "cannot allocate ", num_bytes, " bytes of pinned host memory");
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned_blocks[static_cast<const char*>(ptr)] = num_bytes;
    }
    return {ptr, ptr, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* dest, const void* src, size_t num_bytes) const override {
    default_copy_data(dest, src, num_bytes);
  }
};
PinnedAllocator the_pinned_allocator;

}  // namespace

void set_memory_bytes(int device, int64_t num_bytes) { memories.at(device).capacity = num_bytes; }
int64_t memory_bytes(int device) { return memories.at(device).capacity; }
int64_t bytes_now(int device) { return memories.at(device).now; }
int64_t bytes_peak(int device) { return memories.at(device).peak; }
void reset_peak(int device) { memories.at(device).peak = memories.at(device).now.load(); }
c10::Allocator* device_allocator() { return &sim_allocator; }
c10::Allocator* pinned_allocator() { return &the_pinned_allocator; }

bool is_pinned(const void* ptr) {
  const auto* address = static_cast<const char*>(ptr);
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned_blocks.upper_bound(address);
  if (after == pinned_blocks.begin()) {
    return false;
  }
  const auto& [start, num_bytes] = *std::prev(after);
  return address < start + num_bytes;
}

c10::Storage adopt_storage(const c10::Storage& cpu_storage, int device) {
  const auto num_bytes = static_cast<int64_t>(cpu_storage.nbytes());
  const c10::Device where(kSim, static_cast<c10::DeviceIndex>(device));
  void* ptr = num_bytes > 0 ? cpu_storage.mutable_data() : nullptr;
  c10::DataPtr data(nullptr, where);
  if (ptr != nullptr) {
    charge(device, num_bytes);
    data = c10::DataPtr(ptr, new Block{ptr, num_bytes, device, cpu_storage}, &free_block, where);
  }
  return c10::Storage(c10::Storage::use_byte_size_t(), num_bytes, std::move(data), &sim_allocator,
                      /*resizable=*/true);
}

}  // namespace mxn::sim
