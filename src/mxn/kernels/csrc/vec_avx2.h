// AVX2, FMA and F16C: sixteen lanes are two registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace mxn::MXN_NS {

constexpr int kTileRows = 3;  // of the 16 registers, sums of 3 rows take 12
constexpr int kPlainRows = 4;
constexpr int kMixVectors = 4;

struct F { __m256 a, b; };
struct I { __m256i a, b; };
using B = I;

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
inline F f_load_n(const float* p, int64_t n) {
  alignas(32) float lanes[16] = {};
  for (int64_t i = 0; i < n && i < 16; ++i) lanes[i] = p[i];
  return f_load(lanes);
}
inline void f_store_n(float* p, F v, int64_t n) {
  alignas(32) float lanes[16];
  f_store(lanes, v);
  for (int64_t i = 0; i < n && i < 16; ++i) p[i] = lanes[i];
}
#define MXN_EACH(name, op) \
  inline F name(F x, F y) { return {op(x.a, y.a), op(x.b, y.b)}; }
MXN_EACH(f_add, _mm256_add_ps)
MXN_EACH(f_sub, _mm256_sub_ps)
MXN_EACH(f_mul, _mm256_mul_ps)
MXN_EACH(f_div, _mm256_div_ps)
MXN_EACH(f_max, _mm256_max_ps)
MXN_EACH(f_min, _mm256_min_ps)
#undef MXN_EACH
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
inline F f_abs(F v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
}
inline F f_copysign(F v, F sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  const F size = f_abs(v);
  return {_mm256_or_ps(size.a, _mm256_and_ps(sign.a, bit)), _mm256_or_ps(size.b, _mm256_and_ps(sign.b, bit))};
}
inline F f_round(F v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, mode), _mm256_round_ps(v.b, mode)};
}
inline F f_floor(F v) { return {_mm256_floor_ps(v.a), _mm256_floor_ps(v.b)}; }
inline __m256 scale2(__m256 v, __m256 n) {  // n in [-126, 128]; 2^128 is infinite
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
}
inline F f_scale2(F v, F n) { return {scale2(v.a, n.a), scale2(v.b, n.b)}; }
inline F f_zero_where_below(F v, F x, F low) {
  return {_mm256_and_ps(v.a, _mm256_cmp_ps(x.a, low.a, _CMP_NLT_UQ)),
          _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, low.b, _CMP_NLT_UQ))};
}
inline float f_sum(F v) {
  const __m256 s = _mm256_add_ps(v.a, v.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float f_top(F v) {
  const __m256 s = _mm256_max_ps(v.a, v.b);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline __m128i half_register(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F f_half(const uint16_t* p) { return {_mm256_cvtph_ps(half_register(p)), _mm256_cvtph_ps(half_register(p + 8))}; }
inline __m256 bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_register(p)), 16));
}
inline F f_bf16(const uint16_t* p) { return {bf16(p), bf16(p + 8)}; }
inline F f_int(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline I i_nearest(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline void i_store_s8(int8_t* p, I v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I i_set(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline int32_t i_sum(I v) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(v.a, v.b));
  int32_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}
inline __m128i to_bf16(__m256 v) {  // rounding could carry a NaN to zero
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7FC00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline void f_store_bf16(uint16_t* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(v.a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), to_bf16(v.b));
}
inline B b_load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline B b_low(B v) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}
inline B b_high(B v) { return b_low({_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)}); }
// 16 dims of 16 tokens, [dim / 4][token][4], as [token / 4][dim][4] with `step` bytes between the four; the
// sign bit changes.
inline void b_turn(const uint8_t* p, uint8_t* out, int64_t step) {
  for (int t = 0; t < 16; ++t) {
    for (int h = 0; h < 16; ++h) out[t / 4 * step + 4 * h + t % 4] = static_cast<uint8_t>(p[(h / 4 * 16 + t) * 4 + h % 4] ^ 128);
  }
}
// Four columns of 16 with 6 bits each, out of three lines; see `Weight`.
inline B b_six(const uint8_t* p, int part) {
  auto masked = [](__m256i v, char bits) { return _mm256_and_si256(v, _mm256_set1_epi8(bits)); };
  if (part < 3) {
    const B v = b_load(p + 64 * part);
    return {masked(v.a, 0x3F), masked(v.b, 0x3F)};
  }
  const B x = b_load(p), y = b_load(p + 64), z = b_load(p + 128);
  auto join = [&](__m256i a, __m256i b, __m256i c) {
    const __m256i low = masked(_mm256_srli_epi16(a, 6), 0x03), middle = masked(_mm256_srli_epi16(b, 4), 0x0C);
    return _mm256_or_si256(_mm256_or_si256(low, middle), masked(_mm256_srli_epi16(c, 2), 0x30));
  };
  return {join(x.a, y.a, z.a), join(x.b, y.b, z.b)};
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // to the second cache

inline __m256i dot16(__m256i sum, __m256i u, __m256i a, __m256i factor) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), factor));
}
inline I dot_u7(I sum, B u, int32_t a) {
  const __m256i v = _mm256_set1_epi32(a), one = _mm256_set1_epi16(1);
  return {dot16(sum.a, u.a, v, one), dot16(sum.b, u.b, v, one)};
}
// Four unsigned values of at most 127 with every four signed bytes of v.
inline I dot_s8(I sum, int32_t p, B v) {
  const __m256i u = _mm256_set1_epi32(p), one = _mm256_set1_epi16(1);
  return {dot16(sum.a, u, v.a, one), dot16(sum.b, u, v.b, one)};
}
inline I dot_u8(I sum, B u, int32_t a) {  // in nibbles: a pair of full bytes would saturate int16
  const __m256i v = _mm256_set1_epi32(a), high = _mm256_set1_epi16(16);
  const B top = b_high(u);
  sum = dot_u7(sum, b_low(u), a);
  return {dot16(sum.a, top.a, v, high), dot16(sum.b, top.b, v, high)};
}

}  // namespace mxn::MXN_NS
