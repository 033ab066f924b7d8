// Kept apart from sim.h: only two files need the distributed headers, which are slow to compile.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace mxn::sim {

// A backend for device tensors that lets `gloo`, a backend for host tensors, do the work.
c10::intrusive_ptr<c10d::Backend> collectives_over(c10::intrusive_ptr<c10d::Backend> gloo);

}  // namespace mxn::sim
