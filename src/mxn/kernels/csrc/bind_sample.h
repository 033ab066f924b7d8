#pragma once
#include <nanobind/nanobind.h>

namespace mxn {
void bind_sample(nanobind::module_& m);
}
