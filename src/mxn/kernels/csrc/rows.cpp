// What happens to a row between two products: norm, quantization, activation, rotary positions.
#include "act.h"
#include "common.h"
#include "vec.h"

namespace mxn::MXN_NS {

void rms_norm(const float* x, const float* w, float* y, int64_t n, float eps) {
  F squares = f_zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = f_load_n(x + i, n - i);
    squares = f_fma(v, v, squares);
  }
  const F scale = f_set(1.0f / std::sqrt(f_sum(squares) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = f_mul(f_mul(f_load_n(x + i, n - i), scale), f_load_n(w + i, n - i));
    f_store_n(y + i, v, n - i);
  }
}

// Values of each group in [-127, 127]; what pads k is 0. See `int8_step`.
void quantize(const float* x, int64_t k, int64_t k_padded, int64_t group, int8_t* q, float* scales,
              float* sums, int32_t* isums) {
  for (int64_t start = 0, g = 0; start < k_padded; start += group, ++g) {
    const int64_t end = start + group < k ? start + group : k;
    const Step step = int8_step(x + start, end - start);
    const F factor = f_set(step.factor);
    const int64_t last = step.factor == 0.0f ? start : end;
    I sum = i_zero();
    alignas(64) int8_t lanes[kLanes];
    for (int64_t i = start; i < start + group; i += kLanes) {
      const I v = i < last ? i_nearest(f_mul(f_load_n(x + i, last - i), factor)) : i_zero();
      sum = i_add(sum, v);
      if (i + kLanes <= start + group) {
        i_store_s8(q + i, v);
      } else {
        i_store_s8(lanes, v);
        std::memcpy(q + i, lanes, static_cast<size_t>(start + group - i));
      }
    }
    scales[g] = step.scale;
    isums[g] = i_sum(sum);
    sums[g] = step.scale * static_cast<float>(isums[g]);
  }
}

void activate_row(const float* x, float* y, int64_t n, Act act) {
  for (int64_t i = 0; i < n; i += kLanes) f_store_n(y + i, activate(f_load_n(x + i, n - i), act), n - i);
}

void add_row(const float* x, float scale, float* y, int64_t n) {
  const F s = f_set(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    f_store_n(y + i, f_fma(f_load_n(x + i, n - i), s, f_load_n(y + i, n - i)), n - i);
  }
}

void softcap_row(float* x, int64_t n, float cap) {
  const F inverse = f_set(1.0f / cap), c = f_set(cap);
  for (int64_t i = 0; i < n; i += kLanes) {
    f_store_n(x + i, f_mul(c, f_tanh(f_mul(f_load_n(x + i, n - i), inverse))), n - i);
  }
}

// A first pass finds the largest, a second its place: both read at the speed of memory.
int64_t argmax_row(const float* x, int64_t n) {
  F top = f_set(-INFINITY), fault = f_zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = f_load(x + i);
    top = f_max(top, v);
    fault = f_add(fault, f_mul(v, f_zero()));  // NaN for NaN and for infinities
  }
  float most = f_top(top);
  bool is_odd = f_sum(fault) != 0.0f;
  for (; i < n; ++i) {
    most = x[i] > most ? x[i] : most;
    is_odd = is_odd || !std::isfinite(x[i]);
  }
  if (is_odd) {  // -inf is usual where a grammar forbids; NaN and +inf are faults
    for (i = 0; i < n; ++i) {
      if (std::isnan(x[i])) return -1;
      most = i == 0 || x[i] > most ? x[i] : most;
    }
  }
  if (n == 0 || !std::isfinite(most)) return -1;
  for (i = 0; x[i] != most; ++i) {}
  return i;
}

// Rotates the first 2 * half dims of one head.
void rope(float* x, const float* cos, const float* sin, int half, bool is_interleaved) {
  if (is_interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  for (int i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const F a = f_load_n(x + i, n), b = f_load_n(x + half + i, n);
    const F c = f_load_n(cos + i, n), s = f_load_n(sin + i, n);
    f_store_n(x + i, f_fnma(b, s, f_mul(a, c)), n);
    f_store_n(x + half + i, f_fma(a, s, f_mul(b, c)), n);
  }
}

}  // namespace mxn::MXN_NS
