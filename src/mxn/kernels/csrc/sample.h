// How a token is chosen from a row of logits. No instruction set, no Python.
#pragma once
#include <cstdint>

namespace mxn {

// What one row asks for, in this order: temperature, top-k, top-p, min-p, then a draw.
struct ChoiceRule {
  float temperature = 0.0f;  // 0: the largest, and nothing else counts
  float uniform = 0.0f;      // random, in [0, 1)
  int64_t top_k = 0;         // 0: off
  float top_p = 1.0f;        // 1: off
  float min_p = 0.0f;        // 0: off
};

constexpr int64_t kChoiceBlock = 64;  // logits that share a maximum

// Floats of scratch that `Kernels::choose` needs for rows of n logits.
inline int64_t choice_scratch(int64_t n) { return 2 * (n / kChoiceBlock + 1) + 5 * n; }

}  // namespace mxn
