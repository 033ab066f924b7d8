// Quantizes one block of 16 rows and lays it out as `Weight` says. Loops over plain arrays: the compiler
// vectorizes them for each variant.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common.h"

namespace mxn::MXN_NS {
namespace {

constexpr int kRefits = 3;
constexpr float kShrink[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};  // of a group's range

struct Fit {
  float scale = 0.0f, low = 0.0f, error = INFINITY;
};

inline float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

// Squared error, in units of scale, of values in [first, last] times scale, plus low. The unit keeps the
// squares of very large and very small weights within float.
float error_of(const float* w, int64_t n, float scale, float low, float first, float last) {
  const float inverse = 1.0f / scale;
  float error = 0.0f;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float exact = (w[i] - low) * inverse;
    // Adding 1.5 * 2^23 rounds to the nearest whole number, and vectorizes everywhere.
    const float d = clamp((exact + 12582912.0f) - 12582912.0f, first, last) - exact;
    error += d * d;
  }
  return error;
}

// The scale (and the low end) with the least squared error for the values that `fit` rounds to.
Fit refit(const float* w, int64_t n, const Fit& fit, bool is_symmetric) {
  const float first = is_symmetric ? -8.0f : 0.0f, inverse = 1.0f / fit.scale;
  float sum_q = 0.0f, sum_qq = 0.0f, sum_w = 0.0f, sum_qw = 0.0f;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const float q = clamp((clamp((w[i] - fit.low) * inverse, -16.0f, 16.0f) + 12582912.0f) - 12582912.0f, first, first + 15.0f);
    sum_q += q, sum_qq += q * q, sum_w += w[i], sum_qw += q * w[i];
  }
  Fit found = fit;
  if (is_symmetric) {
    if (sum_qq > 0.0f) found.scale = sum_qw / sum_qq;
    return found;
  }
  const float count = static_cast<float>(n), spread = count * sum_qq - sum_q * sum_q;
  if (spread <= 0.0f) return found;
  found.scale = (count * sum_qw - sum_q * sum_w) / spread;
  found.low = (sum_w - found.scale * sum_q) / count;
  return found;
}

// A scale whose inverse would be infinite: such a group is 0.
inline bool is_nothing(float scale) { return std::fabs(scale) < 1e-37f; }

Fit fit4(const float* w, int64_t n, bool is_symmetric) {
  float least = 0.0f, most = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    least = w[i] < least ? w[i] : least;
    most = w[i] > most ? w[i] : most;
  }
  // Symmetric: the value of largest size becomes -8, so the scale may be negative.
  // In units of the whole range, errors of fits with different scales compare.
  const float unit = is_symmetric ? (most > -least ? most : least) / -8.0f : (most - least) / 15.0f;
  const float first = is_symmetric ? -8.0f : 0.0f;
  Fit best;
  auto is_better = [&](Fit fit) {
    if (is_nothing(fit.scale)) return false;
    const float size = fit.scale / unit;
    fit.error = error_of(w, n, fit.scale, fit.low, first, first + 15.0f) * size * size;
    if (!(fit.error < best.error)) return false;
    best = fit;
    return true;
  };
  for (float shrink : kShrink) is_better({unit * shrink, is_symmetric ? 0.0f : least * shrink, 0.0f});
  for (int turn = 0; turn < kRefits && best.scale != 0.0f; ++turn) {
    if (!is_better(refit(w, n, best, is_symmetric))) break;
  }
  return best;
}

// Adds one value of column `at` to a block that was all zeros.
inline void put(uint8_t* data, int bits, int64_t at, int lane, uint8_t value) {
  if (bits == 8) {
    data[(at / 4 * kLanes + lane) * 4 + at % 4] = value;
    return;
  }
  if (bits == 4) {
    data[(at / 8 * kLanes + lane) * 4 + at % 4] |= static_cast<uint8_t>(at % 8 < 4 ? value : value << 4);
    return;
  }
  uint8_t* lines = data + at / 16 * 192 + lane * 4 + at % 4;
  const int64_t quad = at % 16 / 4;
  if (quad < 3) {
    lines[64 * quad] |= value;
    return;
  }
  for (int i = 0; i < 3; ++i) lines[64 * i] |= static_cast<uint8_t>((value >> (2 * i) & 3) << 6);
}

}  // namespace

// rows: 16 pointers to k floats, null for padding. scales, mins: [G][16]; mins null when symmetric.
void pack_block(const float* const* rows, int64_t k, int64_t k_padded, int64_t group, int bits, uint8_t* data,
                float* scales, float* mins) {
  std::memset(data, 0, static_cast<size_t>(k_padded * kLanes * bits / 8));
  alignas(64) float w[256];
  const int middle = 1 << (bits - 1);
  for (int lane = 0; lane < kLanes; ++lane) {
    float whole = 0.0f, fault = 0.0f;  // largest value of a row that has one scale; NaN beside a fault
    if (group == k_padded && rows[lane]) {
      for (int64_t i = 0; i < k; ++i) {
        whole = std::fabs(rows[lane][i]) > whole ? std::fabs(rows[lane][i]) : whole;
        fault += rows[lane][i] - rows[lane][i];
      }
    }
    for (int64_t begin = 0; begin < k_padded; begin += 128) {
      const int64_t step = group < 128 ? group : 128, end = begin + 128 < k_padded ? begin + 128 : k_padded;
      for (int64_t start = begin; start < end; start += step) {
        const int64_t n = start + step < k_padded ? step : k_padded - start;
        if (group != k_padded) fault = 0.0f;
        for (int64_t i = 0; i < n; ++i) {
          w[i] = rows[lane] && start + i < k ? rows[lane][start + i] : 0.0f;
          fault += w[i] - w[i];
        }
        Fit fit;
        if (bits != 4) {
          float most = whole;
          if (group != k_padded) {
            for (int64_t i = 0; i < n; ++i) most = std::fabs(w[i]) > most ? std::fabs(w[i]) : most;
          }
          const float largest = static_cast<float>(middle - 1);
          fit.scale = is_nothing(most / largest) ? 0.0f : most / largest;
        } else {
          fit = fit4(w, n, mins == nullptr);
        }
        const int64_t g = start / group;
        if (fault != 0.0f) {  // no value of the group means anything, and none may pass for a number
          fit = Fit{fault, 0.0f, 0.0f};
          std::fill_n(w, n, 0.0f);
        }
        scales[g * kLanes + lane] = fit.scale;
        if (mins) mins[g * kLanes + lane] = -fit.low;
        const float inverse = fit.scale == 0.0f || fault != 0.0f ? 0.0f : 1.0f / fit.scale;
        const float offset = mins ? 0.0f : static_cast<float>(middle);
        const float last = static_cast<float>(2 * middle - 1);
        for (int64_t i = 0; i < n; ++i) {
          const float q = clamp(std::nearbyint((w[i] - fit.low) * inverse) + offset, 0.0f, last);
          const uint8_t value = static_cast<uint8_t>(q);
          const int64_t at = start + i;
          put(data, bits, at, lane, value);
        }
      }
    }
  }
}

}  // namespace mxn::MXN_NS
