// Scratch of mixture layers.
#pragma once
#include <vector>

#include "decoder.h"

namespace mxn {

struct Experts {
  Buffer<float> normed, scores, inner, outer, weights;
  Packed gathered, middle;
  std::vector<int64_t> starts, chosen;
};

}  // namespace mxn
