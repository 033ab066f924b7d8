// Which variants were compiled, which this processor can run, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "common.h"

namespace mxn {

struct Variant {
  const char* name;
  const Kernels& (*kernels)();
  bool (*is_usable)();
};

const std::vector<Variant>& variants();  // the best first
const Kernels& kernels();                // in use
// Throws std::invalid_argument, which names the usable ones, for one that is not compiled or not usable.
void use_variant(const std::string& name);  // "": the best

}  // namespace mxn
