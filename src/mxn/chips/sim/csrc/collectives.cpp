// The collective backend `simccl`: gloo over aliases of device memory.
//
// It exists so that code which picks a backend by the chip's name is tested: gloo itself refuses
// device tensors. Every call hands gloo CPU tensors over the same memory, so nothing is copied.
#include "collectives.h"

#include "sim.h"

#include <ATen/core/ivalue_inl.h>
#include <c10/util/Exception.h>

namespace mxn::sim {
namespace {

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

at::Tensor to_cpu(const at::Tensor& tensor) {
  TORCH_CHECK(is_sim(tensor), "simccl works on tensors of device 'sim', got one on ",
              tensor.device());
  return cpu_alias(tensor);
}

Tensors to_cpu(const Tensors& tensors) {
  Tensors out;
  out.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    out.push_back(to_cpu(tensor));
  }
  return out;
}

std::vector<Tensors> to_cpu(const std::vector<Tensors>& lists) {
  std::vector<Tensors> out;
  out.reserve(lists.size());
  for (const auto& list : lists) {
    out.push_back(to_cpu(list));
  }
  return out;
}

Tensors flat(const std::vector<Tensors>& lists) {
  Tensors out;
  for (const auto& list : lists) {
    out.insert(out.end(), list.begin(), list.end());
  }
  return out;
}

// Gloo's work, with the device tensors as its result.
struct SimWork final : c10d::Work {
  SimWork(WorkPtr gloo, Tensors results)
      : c10d::Work(-1, c10d::OpType::UNKNOWN), gloo_(std::move(gloo)), results_(std::move(results)) {}

  bool isCompleted() override { return gloo_->isCompleted(); }
  bool isSuccess() const override { return gloo_->isSuccess(); }
  std::exception_ptr exception() const override { return gloo_->exception(); }
  int sourceRank() const override { return gloo_->sourceRank(); }
  bool wait(std::chrono::milliseconds timeout) override { return gloo_->wait(timeout); }
  void synchronize() override { gloo_->wait(); }
  void abort() override { gloo_->abort(); }
  Tensors result() override { return results_; }

  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    return gloo_->getFuture()->then(
        [results = results_](c10::ivalue::Future& done) -> c10::IValue {
          done.value();  // throws what the collective threw
          return results;
        },
        c10::ListType::create(c10::TensorType::get()));
  }

 private:
  WorkPtr gloo_;
  Tensors results_;
};

WorkPtr wrap(WorkPtr gloo, Tensors results) {
  return c10::make_intrusive<SimWork>(std::move(gloo), std::move(results));
}

struct SimCollectives final : c10d::Backend {
  explicit SimCollectives(c10::intrusive_ptr<c10d::Backend> gloo)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "simccl"; }
  void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }
  void abort() override { gloo_->abort(); }
  void shutdown() override { gloo_->shutdown(); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto cpu = to_cpu(tensors);
    return wrap(gloo_->broadcast(cpu, options), tensors);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto cpu = to_cpu(tensors);
    return wrap(gloo_->allreduce(cpu, options), tensors);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions& options) override {
    auto cpu = to_cpu(tensors);
    return wrap(gloo_->allreduce_coalesced(cpu, options), tensors);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto cpu = to_cpu(tensors);
    return wrap(gloo_->reduce(cpu, options), tensors);
  }
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                    const c10d::AllgatherOptions& options) override {
    auto cpu_outputs = to_cpu(outputs);
    auto cpu_inputs = to_cpu(inputs);
    return wrap(gloo_->allgather(cpu_outputs, cpu_inputs, options), flat(outputs));
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions& options) override {
    auto cpu_output = to_cpu(output);
    auto cpu_input = to_cpu(input);
    return wrap(gloo_->_allgather_base(cpu_output, cpu_input, options), {output});
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    auto cpu_outputs = to_cpu(outputs);
    auto cpu_inputs = to_cpu(inputs);
    return wrap(gloo_->allgather_into_tensor_coalesced(cpu_outputs, cpu_inputs, options), outputs);
  }
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs,
                 const c10d::GatherOptions& options) override {
    auto cpu_outputs = to_cpu(outputs);
    auto cpu_inputs = to_cpu(inputs);
    return wrap(gloo_->gather(cpu_outputs, cpu_inputs, options), flat(outputs));
  }
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                  const c10d::ScatterOptions& options) override {
    auto cpu_outputs = to_cpu(outputs);
    auto cpu_inputs = to_cpu(inputs);
    return wrap(gloo_->scatter(cpu_outputs, cpu_inputs, options), outputs);
  }
  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& options) override {
    auto cpu_outputs = to_cpu(outputs);
    auto cpu_inputs = to_cpu(inputs);
    return wrap(gloo_->reduce_scatter(cpu_outputs, cpu_inputs, options), outputs);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    auto cpu_output = to_cpu(output);
    auto cpu_input = to_cpu(input);
    return wrap(gloo_->_reduce_scatter_base(cpu_output, cpu_input, options), {output});
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    auto cpu_outputs = to_cpu(outputs);
    auto cpu_inputs = to_cpu(inputs);
    return wrap(gloo_->reduce_scatter_tensor_coalesced(cpu_outputs, cpu_inputs, options), outputs);
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits,
                        const c10d::AllToAllOptions& options) override {
    auto cpu_output = to_cpu(output);
    auto cpu_input = to_cpu(input);
    auto work = gloo_->alltoall_base(cpu_output, cpu_input, output_splits, input_splits, options);
    return wrap(std::move(work), {output});
  }
  WorkPtr send(Tensors& tensors, int to_rank, int tag) override {
    auto cpu = to_cpu(tensors);
    return wrap(gloo_->send(cpu, to_rank, tag), tensors);
  }
  WorkPtr recv(Tensors& tensors, int from_rank, int tag) override {
    auto cpu = to_cpu(tensors);
    return wrap(gloo_->recv(cpu, from_rank, tag), tensors);
  }
  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    auto cpu = to_cpu(tensors);
    return wrap(gloo_->recvAnysource(cpu, tag), tensors);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    auto on_host = options;
    on_host.device = std::nullopt;
    return wrap(gloo_->barrier(on_host), {});
  }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> collectives_over(c10::intrusive_ptr<c10d::Backend> gloo) {
  return c10::make_intrusive<SimCollectives>(std::move(gloo));
}

}  // namespace mxn::sim
