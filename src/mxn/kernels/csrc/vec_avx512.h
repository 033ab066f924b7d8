// AVX-512 F, BW, DQ and VL; with MXN_VNNI also VNNI.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace mxn::MXN_NS {

constexpr int kTileRows = 8;    // int32 and float sums of 8 rows stay in the 32 registers
constexpr int kPlainRows = 12;
constexpr int kMixVectors = 16; // sums of attention that stay in registers

using F = __m512;
using I = __m512i;
using B = __m512i;

inline F f_zero() { return _mm512_setzero_ps(); }
inline F f_set(float v) { return _mm512_set1_ps(v); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }
inline F f_load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void f_store_n(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
inline F f_copysign(F a, F sign) { return _mm512_or_ps(_mm512_abs_ps(a), _mm512_and_ps(sign, f_set(-0.0f))); }
inline F f_round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_floor(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline F f_scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
inline F f_zero_where_below(F v, F x, F low) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), v);
}
inline float f_sum(F a) { return _mm512_reduce_add_ps(a); }
inline float f_top(F a) { return _mm512_reduce_max_ps(a); }
inline F f_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F f_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F f_int(I a) { return _mm512_cvtepi32_ps(a); }
inline I i_nearest(F a) { return _mm512_cvtps_epi32(a); }
inline void i_store_s8(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a));
}
inline void b_store(uint8_t* p, B v) { _mm512_storeu_si512(p, v); }
inline I i_load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline I i_zero() { return _mm512_setzero_si512(); }
inline I i_set(int32_t v) { return _mm512_set1_epi32(v); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline int32_t i_sum(I a) { return _mm512_reduce_add_epi32(a); }
inline void f_store_bf16(uint16_t* p, F v) {  // to nearest even; rounding could carry a NaN to zero
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __m512i nan = _mm512_set1_epi32(0x7FC00000);
  const __m512i rounded = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline B b_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline B b_low(B v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline B b_high(B v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
// 16 dims of 16 tokens, [dim / 4][token][4], as [token / 4][dim][4] with `step` bytes between the four; the
// sign bit changes.
inline void b_turn(const uint8_t* p, uint8_t* out, int64_t step) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i v[4];  // of four dims: 16 tokens, then by quads of tokens
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_loadu_si512(p + 64 * i), order), _mm512_set1_epi8(-128));
  }
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xEE), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
  _mm512_storeu_si512(out, _mm512_shuffle_i32x4(a, b, 0x88));
  _mm512_storeu_si512(out + step, _mm512_shuffle_i32x4(a, b, 0xDD));
  _mm512_storeu_si512(out + 2 * step, _mm512_shuffle_i32x4(c, d, 0x88));
  _mm512_storeu_si512(out + 3 * step, _mm512_shuffle_i32x4(c, d, 0xDD));
}
// Four columns of 16 with 6 bits each, out of three lines; see `Weight`.
inline B b_six(const uint8_t* p, int part) {
  const __m512i low = _mm512_set1_epi8(0x3F);
  if (part < 3) return _mm512_and_si512(b_load(p + 64 * part), low);
  const __m512i a = _mm512_srli_epi16(b_load(p), 6), b = _mm512_srli_epi16(b_load(p + 64), 4);
  const __m512i c = _mm512_srli_epi16(b_load(p + 128), 2);
  constexpr int kChoose = 0xCA;  // of the second where the first has a bit, else of the third
  const __m512i ab = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x03), a, b, kChoose);
  return _mm512_and_si512(_mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0F), ab, c, kChoose), low);
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }  // to the second cache

// dot_s8: four unsigned values of at most 127 with every four signed bytes of v.
#if defined(MXN_VNNI)
inline I dot_s8(I sum, int32_t p, B v) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(p), v); }
inline I dot_u7(I sum, B u, int32_t a) { return _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi32(a)); }
inline I dot_u8(I sum, B u, int32_t a) { return _mm512_dpbusd_epi32(sum, u, _mm512_set1_epi32(a)); }
#else
inline I dot_s8(I sum, int32_t p, B v) {
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(p), v);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
inline I dot_u7(I sum, B u, int32_t a) {
  const __m512i pairs = _mm512_maddubs_epi16(u, _mm512_set1_epi32(a));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
inline I dot_u8(I sum, B u, int32_t a) {  // in nibbles: a pair of full bytes would saturate int16
  const __m512i v = _mm512_set1_epi32(a);
  const __m512i low = _mm512_maddubs_epi16(b_low(u), v), high = _mm512_maddubs_epi16(b_high(u), v);
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
}
#endif

}  // namespace mxn::MXN_NS
