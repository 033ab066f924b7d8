// Runs any aten operator on the CPU kernels, over the device's own memory.
//
// Arguments become CPU tensors that alias device memory, the CPU kernel runs, and results become
// device tensors again: views share the storage of the argument they view, new ones are adopted.
// Nothing is copied. What a real chip would refuse is refused here: tensors of several devices,
// generators of another device, operators that somebody wrote for the CPU only.
#include "sim.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <set>

namespace mxn::sim {
namespace {

// A CPU storage over the memory of a device storage, which it keeps alive.
c10::Storage cpu_storage_over(const c10::Storage& device_storage) {
  auto keep_alive = device_storage.getWeakStorageImpl().lock();
  void* ptr = device_storage.mutable_data();
  c10::DataPtr data(ptr, keep_alive.release(), [](void* context) {
    c10::intrusive_ptr<c10::StorageImpl>::reclaim(static_cast<c10::StorageImpl*>(context));
  }, c10::kCPU);
  return c10::Storage(c10::Storage::use_byte_size_t(), device_storage.nbytes(), std::move(data),
                      c10::GetCPUAllocator(), /*resizable=*/true);
}

// A tensor with the shape, strides and lazy bits of `like` over another storage.
at::Tensor tensor_over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key),
                                                      like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                   like.storage_offset());
  if (like.is_conj()) {
    out._set_conj(true);
  }
  if (like.is_neg()) {
    out._set_neg(true);
  }
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    out.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return out;
}

// Operators that take index tensors in host memory on every accelerator.
bool takes_host_indices(const std::string& name) {
  static const std::set<std::string> names = {"aten::index", "aten::index_put", "aten::index_put_",
                                              "aten::_index_put_impl_", "aten::_unsafe_index",
                                              "aten::_unsafe_index_put"};
  return names.count(name) > 0;
}

// One operator under way: what its arguments were, and what they became.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), schema_(op.schema()), stack_(stack), first_(stack->size() - num_arguments()) {
    find_device();
  }

  int device() const { return device_; }

  void to_cpu() {
    for (size_t i = 0; i < num_arguments(); ++i) {
      argument_to_cpu(i);
    }
  }

  // Writes back what the CPU kernel did to the metadata of arguments, then converts the results.
  void to_device() {
    for (auto& pair : pairs_) {
      follow_resize(pair);
    }
    const size_t num_returns = schema_.returns().size();
    for (size_t i = stack_->size() - num_returns; i < stack_->size(); ++i) {
      result_to_device((*stack_)[i]);
    }
  }

 private:
  struct Pair {
    at::Tensor device;
    at::Tensor cpu;
    void* data;  // of the storage, when the operator began
  };

  size_t num_arguments() const { return schema_.arguments().size(); }
  c10::IValue& argument(size_t i) { return (*stack_)[first_ + i]; }

  // The device of the operator: that of its first tensor here, else of a device or generator.
  void find_device() {
    int named = -1;
    for (size_t i = 0; i < num_arguments() && device_ < 0; ++i) {
      const auto& value = argument(i);
      if (value.isTensor()) {
        note_device(value.toTensor());
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorList()) {
          note_device(tensor);
        }
      } else if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
          note_device(tensor.value_or(at::Tensor()));
        }
      } else if (value.isDevice() && value.toDevice().type() == kSim) {
        named = value.toDevice().index();
      } else if (value.isGenerator() && value.toGenerator().device().type() == kSim) {
        named = value.toGenerator().device().index();
      }
    }
    if (device_ < 0) {
      device_ = named < 0 ? current_device() : named;
    }
  }

  void note_device(const at::Tensor& tensor) {
    if (device_ < 0 && is_sim(tensor)) {
      device_ = tensor.device().index();
    }
  }

  void argument_to_cpu(size_t i) {
    auto& value = argument(i);
    const auto& declared = schema_.arguments()[i];
    if (value.isTensor()) {
      value = borrow(value.toTensor(), declared);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> out;
      for (const at::Tensor& tensor : value.toTensorList()) {
        out.push_back(borrow(tensor, declared));
      }
      value = std::move(out);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> out;
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
        out.push_back(tensor ? std::optional(borrow(*tensor, declared)) : std::nullopt);
      }
      value = std::move(out);
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator() || (value.isNone() && declared.name() == "generator")) {
      value = borrow_generator(value);
    }
  }

  at::Tensor borrow(const at::Tensor& tensor, const c10::Argument& declared) {
    if (!tensor.defined()) {
      return tensor;
    }
    check_device(tensor, declared);
    if (!is_sim(tensor)) {
      return tensor;
    }
    for (const auto& pair : pairs_) {
      if (pair.device.is_same(tensor)) {
        return pair.cpu;
      }
    }
    auto cpu = tensor_over(shared_cpu_storage(tensor.storage()), c10::DispatchKey::CPU, tensor);
    pairs_.push_back({tensor, cpu, tensor.storage().mutable_data()});
    return cpu;
  }

  // Views of one storage must alias one CPU storage, or CPU kernels could not see that they overlap.
  c10::Storage shared_cpu_storage(const c10::Storage& storage) {
    for (const auto& pair : pairs_) {
      if (pair.device.storage().is_alias_of(storage)) {
        return pair.cpu.storage();
      }
    }
    return cpu_storage_over(storage);
  }

  void check_device(const at::Tensor& tensor, const c10::Argument& declared) const {
    const auto device = tensor.device();
    if (device.type() == kSim && device.index() == device_) {
      return;
    }
    const bool is_index = declared.name() == "indices" || declared.name() == "index";
    if (device.is_cpu()) {
      if (is_index && takes_host_indices(schema_.name())) {
        return;
      }
      // CUDA lets a scalar in host memory pass where it is a number, not where it is written or
      // where it says which elements to take.
      const bool is_written = declared.alias_info() != nullptr && declared.alias_info()->isWrite();
      if (tensor.dim() == 0 && !is_written && !is_index) {
        return;
      }
    }
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two ",
                "devices, sim:", device_, " and ", device, "! (when checking argument ",
                declared.name(), " of ", schema_.name(), ")");
  }

  at::Generator borrow_generator(const c10::IValue& value) const {
    if (value.isNone()) {
      return cpu_generator_of(default_generator(device_));
    }
    const auto generator = value.toGenerator();
    TORCH_CHECK(generator.device().type() == kSim && generator.device().index() == device_,
                "Expected a 'sim:", device_, "' generator, but found '", generator.device(), "'");
    return cpu_generator_of(generator);
  }

  // An `out` tensor that the CPU kernel resized: the device tensor must follow.
  void follow_resize(Pair& pair) const {
    const bool is_moved = pair.cpu.storage().data() != pair.data;
    if (!is_moved && pair.cpu.sizes() == pair.device.sizes() &&
        pair.cpu.strides() == pair.device.strides()) {
      return;
    }
    auto* impl = pair.device.unsafeGetTensorImpl();
    if (is_moved) {
      impl->set_storage_keep_dtype(adopt_storage(pair.cpu.storage(), device_));
    }
    impl->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(), pair.cpu.storage_offset());
  }

  void result_to_device(c10::IValue& value) const {
    if (value.isTensor()) {
      value = give_back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> out;
      for (const at::Tensor& tensor : value.toTensorList()) {
        out.push_back(give_back(tensor));
      }
      value = std::move(out);
    }
  }

  at::Tensor give_back(const at::Tensor& result) const {
    if (!result.defined() || is_sim(result)) {
      return result;
    }
    TORCH_CHECK_NOT_IMPLEMENTED(result.layout() == c10::kStrided, schema_.name(), " gives a ",
                                result.layout(), " tensor, which the simulated chip does not have");
    for (const auto& pair : pairs_) {
      if (pair.cpu.is_same(result)) {
        return pair.device;
      }
    }
    const auto key = c10::DispatchKey::PrivateUse1;
    for (const auto& pair : pairs_) {
      if (pair.cpu.storage().is_alias_of(result.storage())) {
        return tensor_over(pair.device.storage(), key, result);
      }
    }
    return tensor_over(adopt_storage(result.storage(), device_), key, result);
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  size_t first_;
  int device_ = -1;
  c10::SmallVector<Pair, 6> pairs_;
};

// A kernel that somebody wrote for the CPU does not exist on another chip.
void check_namespace(const c10::FunctionSchema& schema) {
  const auto& name = schema.name();
  const bool is_torch_op = name.rfind("aten::", 0) == 0 || name.rfind("prims::", 0) == 0;
  TORCH_CHECK_NOT_IMPLEMENTED(is_torch_op, "Could not run '", name,
                              "' on the simulated chip: there is no kernel for device 'sim'");
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { run_on_cpu(op, stack); }

}  // namespace

at::Tensor cpu_alias(const at::Tensor& tensor) {
  if (!is_sim(tensor)) {
    return tensor;
  }
  return tensor_over(cpu_storage_over(tensor.storage()), c10::DispatchKey::CPU, tensor);
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_namespace(op.schema());
  // The aliases are plain tensors: neither autograd nor autocast of the CPU may see them.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Call call(op, stack);
  const Launch launch(op.schema().name(), call.device());
  call.to_cpu();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.to_device();
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace mxn::sim
