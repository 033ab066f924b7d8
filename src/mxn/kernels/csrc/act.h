// Activations of sixteen lanes. Knows no rows.
#pragma once
#include "common.h"
#include "vec.h"

namespace mxn::MXN_NS {

inline F activate(F x, Act act) {
  switch (act) {
    case Act::silu: return f_silu(x);
    case Act::gelu: return f_gelu(x);
    case Act::gelu_tanh: return f_gelu_tanh(x);
    case Act::relu: break;
  }
  return f_max(f_zero(), x);  // in this order NaN stays NaN
}

}  // namespace mxn::MXN_NS
