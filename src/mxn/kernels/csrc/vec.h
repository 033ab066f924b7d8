// Sixteen lanes of one instruction set: the only file with intrinsics. MXN_NS names the variant, so no
// inline function is shared between files that are compiled with different flags.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(MXN_AVX512)
#include "vec_avx512.h"
#elif defined(MXN_AVX2)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif

namespace mxn::MXN_NS {

inline int32_t four_bytes(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// How n floats become int8 values: value = nearest(x * factor), x = value * scale. A factor of 0 means
// that all values are 0: where the largest is so small that its factor would be infinite (scale 0), and
// beside a NaN or infinity (scale NaN, which carries the fault on to whatever is computed from them).
struct Step {
  float factor, scale;
};
inline Step int8_step(const float* x, int64_t n) {
  F top = f_zero(), fault = f_zero();  // a maximum can lose a NaN, x - x cannot
  for (int64_t i = 0; i < n; i += 16) {
    const F v = f_load_n(x + i, n - i);
    top = f_max(top, f_abs(v));
    fault = f_add(fault, f_sub(v, v));
  }
  const float sum = f_sum(fault), most = f_top(top);
  if (sum != 0.0f) return {0.0f, sum};
  if (most < 1e-36f) return {0.0f, 0.0f};
  return {127.0f / most, most / 127.0f};
}

// 2^round(x / ln 2) times a polynomial of the rest; 0 below -87.3, infinite above 88.7. NaN stays NaN:
// of a minimum or maximum with a NaN, f_min and f_max return the second operand.
inline F f_exp(F x) {
  const F low = f_set(-87.3f);
  const F clamped = f_min(f_set(88.73f), f_max(low, x));
  const F n = f_round(f_mul(clamped, f_set(1.44269504088896341f)));
  F r = f_fma(n, f_set(-0.693359375f), clamped);
  r = f_fma(n, f_set(2.12194440e-4f), r);
  F p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_fma(f_mul(r, r), p, f_add(r, f_set(1.0f)));
  return f_zero_where_below(f_scale2(p, n), x, low);
}

inline F f_silu(F x) { return f_div(x, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }

// tanh through exp(-2|x|), which cannot overflow.
inline F f_tanh(F x) {
  const F e = f_exp(f_mul(f_abs(x), f_set(-2.0f)));
  const F t = f_div(f_sub(f_set(1.0f), e), f_add(f_set(1.0f), e));
  return f_copysign(t, x);
}

inline F f_gelu_tanh(F x) {
  const F cube = f_mul(f_mul(x, x), x);
  const F inner = f_mul(f_set(0.7978845608028654f), f_fma(f_set(0.044715f), cube, x));
  return f_mul(f_mul(f_set(0.5f), x), f_add(f_set(1.0f), f_tanh(inner)));
}

inline F f_gelu(F x) {  // the exact one: erf has no short polynomial over its whole range
  float lanes[16];
  f_store(lanes, x);
  for (float& v : lanes) v = 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
  return f_load(lanes);
}

}  // namespace mxn::MXN_NS
