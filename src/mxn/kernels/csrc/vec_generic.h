// Plain C++ for every processor; the compiler makes of it what it can.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace mxn::MXN_NS {

constexpr int kTileRows = 2;
constexpr int kPlainRows = 2;
constexpr int kMixVectors = 4;

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct B { uint8_t v[64]; };

#define MXN_LANES for (int i = 0; i < 16; ++i)
inline F f_set(float x) { F r; MXN_LANES r.v[i] = x; return r; }
inline F f_zero() { return f_set(0.0f); }
inline F f_load(const float* p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline void f_store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline F f_load_n(const float* p, int64_t n) { F r; MXN_LANES r.v[i] = i < n ? p[i] : 0.0f; return r; }
inline void f_store_n(float* p, F x, int64_t n) { MXN_LANES if (i < n) p[i] = x.v[i]; }
inline F f_add(F a, F b) { MXN_LANES a.v[i] += b.v[i]; return a; }
inline F f_sub(F a, F b) { MXN_LANES a.v[i] -= b.v[i]; return a; }
inline F f_mul(F a, F b) { MXN_LANES a.v[i] *= b.v[i]; return a; }
inline F f_div(F a, F b) { MXN_LANES a.v[i] /= b.v[i]; return a; }
inline F f_fma(F a, F b, F c) { MXN_LANES a.v[i] = a.v[i] * b.v[i] + c.v[i]; return a; }
inline F f_fnma(F a, F b, F c) { MXN_LANES a.v[i] = c.v[i] - a.v[i] * b.v[i]; return a; }
inline F f_max(F a, F b) { MXN_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F f_min(F a, F b) { MXN_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F f_abs(F a) { MXN_LANES a.v[i] = std::fabs(a.v[i]); return a; }
inline F f_copysign(F a, F s) { MXN_LANES a.v[i] = std::copysign(a.v[i], s.v[i]); return a; }
inline F f_round(F a) { MXN_LANES a.v[i] = std::nearbyint(a.v[i]); return a; }
inline F f_floor(F a) { MXN_LANES a.v[i] = std::floor(a.v[i]); return a; }
inline F f_scale2(F a, F n) { MXN_LANES a.v[i] = std::ldexp(a.v[i], static_cast<int>(n.v[i])); return a; }
inline F f_zero_where_below(F a, F x, F low) { MXN_LANES a.v[i] = x.v[i] < low.v[i] ? 0.0f : a.v[i]; return a; }
inline float f_sum(F a) { float s = 0; MXN_LANES s += a.v[i]; return s; }
inline float f_top(F a) { float m = a.v[0]; MXN_LANES m = a.v[i] > m ? a.v[i] : m; return m; }
inline float bits_to_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, part = h & 1023;
  if (exponent == 0) return bits_to_float(sign | 0x3F800000u) * (static_cast<float>(part) * 5.9604644775390625e-8f);
  if (exponent == 31) return bits_to_float(sign | 0x7F800000u | part << 13);
  return bits_to_float(sign | (exponent + 112) << 23 | part << 13);
}
inline F f_half(const uint16_t* p) { F r; MXN_LANES r.v[i] = from_half(p[i]); return r; }
inline F f_bf16(const uint16_t* p) { F r; MXN_LANES r.v[i] = bits_to_float(static_cast<uint32_t>(p[i]) << 16); return r; }
inline F f_int(I a) { F r; MXN_LANES r.v[i] = static_cast<float>(a.v[i]); return r; }
inline I i_nearest(F a) { I r; MXN_LANES r.v[i] = static_cast<int32_t>(std::nearbyint(a.v[i])); return r; }
inline void i_store_s8(int8_t* p, I a) {
  MXN_LANES p[i] = static_cast<int8_t>(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
}
inline I i_set(int32_t x) { I r; MXN_LANES r.v[i] = x; return r; }
inline I i_zero() { return i_set(0); }
inline I i_add(I a, I b) { MXN_LANES a.v[i] += b.v[i]; return a; }
inline int32_t i_sum(I a) { int32_t s = 0; MXN_LANES s += a.v[i]; return s; }
inline void f_store_bf16(uint16_t* p, F a) {
  MXN_LANES {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    p[i] = static_cast<uint16_t>(a.v[i] == a.v[i] ? rounded : 0x7FC0);  // a NaN could carry to zero
  }
}
inline B b_load(const uint8_t* p) { B r; std::memcpy(r.v, p, 64); return r; }
inline B b_low(B x) { for (uint8_t& b : x.v) b &= 15; return x; }
inline B b_high(B x) { for (uint8_t& b : x.v) b >>= 4; return x; }
// 16 dims of 16 tokens, [dim / 4][token][4], as [token / 4][dim][4] with `step` bytes between the four; the
// sign bit changes.
inline void b_turn(const uint8_t* p, uint8_t* out, int64_t step) {
  for (int t = 0; t < 16; ++t) {
    for (int h = 0; h < 16; ++h) out[t / 4 * step + 4 * h + t % 4] = static_cast<uint8_t>(p[(h / 4 * 16 + t) * 4 + h % 4] ^ 128);
  }
}
// Four columns of 16 with 6 bits each, out of three lines; see `Weight`.
inline B b_six(const uint8_t* p, int part) {
  B six;
  for (int i = 0; i < 64; ++i) {
    six.v[i] = static_cast<uint8_t>(part < 3 ? p[64 * part + i] & 63 : p[i] >> 6 | p[64 + i] >> 6 << 2 | p[128 + i] >> 6 << 4);
  }
  return six;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

inline I dot_u8(I sum, B u, int32_t a) {
  int8_t v[4];
  std::memcpy(v, &a, 4);
  MXN_LANES for (int j = 0; j < 4; ++j) sum.v[i] += static_cast<int32_t>(u.v[4 * i + j]) * v[j];
  return sum;
}
// Four unsigned values of at most 127 with every four signed bytes of v.
inline I dot_s8(I sum, int32_t p, B v) {
  uint8_t u[4];
  std::memcpy(u, &p, 4);
  MXN_LANES for (int j = 0; j < 4; ++j) sum.v[i] += u[j] * static_cast<int8_t>(v.v[4 * i + j]);
  return sum;
}
inline I dot_u7(I sum, B u, int32_t a) { return dot_u8(sum, u, a); }
#undef MXN_LANES

}  // namespace mxn::MXN_NS
