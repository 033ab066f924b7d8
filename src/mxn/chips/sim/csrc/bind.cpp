// What Python sees. device.py is the only caller.
#include "collectives.h"
#include "sim.h"

#include <torch/csrc/utils/pybind.h>

namespace sim = mxn::sim;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("configure", &sim::configure);
  m.def("num_devices", &sim::num_devices);
  m.def("current_device", &sim::current_device);
  m.def("set_device", &sim::set_device);
  m.def("default_generator", &sim::default_generator);

  m.def("memory_bytes", &sim::memory_bytes);
  m.def("set_memory_bytes", &sim::set_memory_bytes);
  m.def("bytes_now", &sim::bytes_now);
  m.def("bytes_peak", &sim::bytes_peak);
  m.def("reset_peak", &sim::reset_peak);

  m.def("launch_us", [] { return sim::knobs.launch_us.load(); });
  m.def("set_launch_us", [](double value) { sim::knobs.launch_us = value; });
  m.def("slow_factor", [] { return sim::knobs.slow_factor.load(); });
  m.def("set_slow_factor", [](double value) { sim::knobs.slow_factor = value; });
  m.def("link_bytes_per_s", [] { return sim::knobs.link_bytes_per_s.load(); });
  m.def("set_link_bytes_per_s", [](double value) { sim::knobs.link_bytes_per_s = value; });
  m.def("poison", [] { return sim::knobs.poison.load(); });
  m.def("set_poison", [](bool value) { sim::knobs.poison = value; });
  m.def("fail_countdown", [] { return std::max<int64_t>(0, sim::knobs.fail_countdown); });
  m.def("set_fail_after", &sim::set_fail_after);

  m.def("operator_counts", &sim::operator_counts);
  m.def("reset_operator_counts", &sim::reset_operator_counts);
  m.def("copy_counts", &sim::copy_counts);
  m.def("reset_copy_counts", &sim::reset_copy_counts);

  m.def("collectives_over", &sim::collectives_over);
}
