// What torch asks of a device type: current device, streams, events, generators, hooks.
// Everything is synchronous, so streams are names and events are times.
#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <array>
#include <chrono>
#include <cstring>

namespace mxn::sim {
namespace {

int device_count = 0;
thread_local int this_device = 0;
thread_local std::array<c10::StreamId, kMaxDevices> this_stream{};  // 0 is the default stream

c10::Device sim_device(int index) { return {kSim, static_cast<c10::DeviceIndex>(index)}; }
int index_or_current(int index) { return index < 0 ? this_device : index; }

struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kSim;

  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return sim_device(this_device); }
  void setDevice(c10::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    this_device = index_or_current(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(device_count);
  }

  c10::Stream stream(int index, c10::StreamId id) const {
    return c10::Stream(c10::Stream::UNSAFE, sim_device(index), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    const int index = index_or_current(device.index());
    return stream(index, this_stream[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(index_or_current(device.index()), 0);
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/ = 0) const override {
    static std::atomic<c10::StreamId> next_id{1};
    return stream(index_or_current(device.index()), next_id++);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    const int index = index_or_current(to.device_index());
    const auto before = stream(index, this_stream[index]);
    this_stream[index] = to.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  using Clock = std::chrono::steady_clock;
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Clock::time_point;
    }
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    const std::chrono::duration<double, std::milli> elapsed =
        *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
    return elapsed.count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard);

// Says it belongs to the device, and hands its numbers out of a CPU generator, which is what the
// CPU kernels can draw from. One lives in each SimGenerator, so no state is ever copied.
struct SimGenerator final : c10::GeneratorImpl {
  explicit SimGenerator(int device)
      : GeneratorImpl(sim_device(device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(at::detail::createCPUGenerator()) {}

  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  SimGenerator* clone_impl() const override {
    auto* copy = new SimGenerator(device().index());
    copy->cpu = cpu.clone();
    return copy;
  }

  mutable at::Generator cpu;
};

struct SimHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return SimGuard().deviceCount(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return SimGuard().getDevice().index(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return SimGuard().exchangeDevice({kSim, device}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<SimGenerator>(index_or_current(device));
  }
  at::Device getDeviceFromPtr(void*) const override { return sim_device(this_device); }
  bool isPinnedPtr(const void* ptr) const override { return is_pinned(ptr); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t num_bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    auto data = device_allocator()->allocate(num_bytes);
    const size_t kept = std::min(num_bytes, storage.nbytes());
    if (kept > 0) {
      std::memcpy(data.get(), storage.data(), kept);
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(num_bytes);
  }
};

// torch keeps the hooks for the life of the process, so they are never freed.
const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new SimHooks);
  return true;
}();

}  // namespace

void configure(int num_devices, int64_t num_bytes) {
  TORCH_CHECK(num_devices >= 1 && num_devices <= kMaxDevices,
              "the number of simulated devices must be 1 to ", kMaxDevices, ", got ", num_devices);
  device_count = num_devices;
  for (int i = 0; i < num_devices; ++i) {
    set_memory_bytes(i, num_bytes);
  }
}

int num_devices() { return device_count; }
int current_device() { return this_device; }

void set_device(int device) {
  TORCH_CHECK(device < device_count, "sim: invalid device ordinal ", device, ", there are ",
              device_count);
  this_device = index_or_current(device);
}

const at::Generator& default_generator(int device) {
  static const auto generators = [] {
    std::vector<at::Generator> all;
    for (int i = 0; i < kMaxDevices; ++i) {
      all.push_back(at::make_generator<SimGenerator>(i));
    }
    return all;
  }();
  return generators.at(index_or_current(device));
}

at::Generator cpu_generator_of(const at::Generator& sim_generator) {
  return static_cast<SimGenerator*>(sim_generator.unsafeGetGeneratorImpl())->cpu;
}

}  // namespace mxn::sim
