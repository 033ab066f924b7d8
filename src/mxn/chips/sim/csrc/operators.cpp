// The operators that cannot be borrowed from the CPU: those that make, view, move or resize memory.
#include "sim.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace mxn::sim {
namespace {

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

c10::Device device_or_current(std::optional<c10::Device> device) {
  return device.value_or(c10::Device(kSim, static_cast<c10::DeviceIndex>(current_device())));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<c10::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys,
                                           c10::dtype_or_default(dtype));
}

CopyKind copy_kind(const at::Tensor& src, const at::Tensor& dest) {
  if (!is_sim(src)) {
    return CopyKind::kHostToDevice;
  }
  if (!is_sim(dest)) {
    return CopyKind::kDeviceToHost;
  }
  return src.device() == dest.device() ? CopyKind::kOnDevice : CopyKind::kDeviceToDevice;
}

at::Tensor copy_from(const at::Tensor& src, const at::Tensor& dest, bool non_blocking) {
  static const std::string kName = "aten::copy_";
  const auto kind = copy_kind(src, dest);
  const auto num_bytes = static_cast<int64_t>(dest.numel() * dest.element_size());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Launch launch(kName, (is_sim(dest) ? dest : src).device().index());
  if (kind != CopyKind::kOnDevice) {
    launch.add_copy_bytes(num_bytes);
  }
  cpu_alias(dest).copy_(cpu_alias(src), non_blocking);
  count_copy(kind, num_bytes);
  return dest;
}

at::Tensor copy_from_and_resize(const at::Tensor& src, const at::Tensor& dest) {
  dest.resize_(src.sizes());
  return copy_from(src, dest, /*non_blocking=*/false);
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size,
                         std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());  // new memory comes from the current device
  return at::native::resize_(self, size, format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset,
                        c10::IntArrayRef size, c10::IntArrayRef stride) {
  const c10::DeviceGuard guard(self.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  return at::native::set_(self, std::move(source));
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::native::set_tensor_(self, source);
}

// Composed here because the CPU kernel would draw from the generator of the CPU.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p,
                                                  std::optional<bool> train) {
  if (!train.value_or(true) || p == 0) {
    return {input.clone(), at::empty_like(input, at::kBool).fill_(true)};
  }
  auto mask = at::empty_like(input, at::kBool).bernoulli_(1 - p);
  const double scale = p < 1 ? 1 / (1 - p) : 0;
  return {input.mul(mask).mul_(scale), mask};
}

int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>&, double, bool, std::optional<double>,
                         bool) {
  return 0;  // at::SDPBackend::math: made of operators that every chip has
}

void record_stream(at::Tensor&, at::Stream) {}  // operators are synchronous

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("is_set_to", at::native::is_set_to);
  m.impl("native_dropout", native_dropout);
  m.impl("_fused_sdp_choice", fused_sdp_choice);
  m.impl("record_stream", record_stream);
  // torch's own choice for plug-in devices is an error, so these go to the CPU like all others.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

}  // namespace
}  // namespace mxn::sim
