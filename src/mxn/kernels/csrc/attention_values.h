// Sums of values by weights: of int8 values as whole numbers, of plain ones as floats, of latent ones out of
// the layout of keys.
#pragma once
#include "attention_blocks.h"

namespace mxn::MXN_NS {
namespace {

inline F value_at(CacheType type, const uint8_t* p, int64_t i) {
  if (type == CacheType::bf16) return f_bf16(reinterpret_cast<const uint16_t*>(p) + i);
  return f_load(reinterpret_cast<const float*>(p) + i);
}

// sums[r][v] += weight * value over the tokens of one block. `n` of its 16 tokens exist.
template <int MR, int NV>
void mix(CacheType type, const uint8_t* values, Ahead& ahead, int dim, int j, const float* weights, int n,
         float* out) {
  F sum[MR][NV];
  Ahead fetching = ahead;
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) sum[r][v] = f_load(out + r * dim + j + v * kLanes);
  }
  for (int t = 0; t < n; ++t) {
    F row[NV];
    for (int v = 0; v < NV; ++v) row[v] = value_at(type, values, int64_t{t} * dim + j + v * kLanes);
    if constexpr (NV > 1) fetching.fetch<NV / 2>();
    for (int r = 0; r < MR; ++r) {
      const F weight = f_set(weights[r * kChunk + t]);
      for (int v = 0; v < NV; ++v) sum[r][v] = f_fma(row[v], weight, sum[r][v]);
    }
  }
  ahead = fetching;
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) f_store(out + r * dim + j + v * kLanes, sum[r][v]);
  }
}

// The last dims of a head whose size is no multiple of 16.
void mix_tail(CacheType type, const uint8_t* values, int dim, int j, int rows, const float* weights, int n, float* out) {
  for (int t = 0; t < n; ++t) {
    for (int i = j; i < dim; ++i) {
      const int64_t at = int64_t{t} * dim + i;
      float value;
      if (type == CacheType::bf16) {
        const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(values)[at]) << 16;
        std::memcpy(&value, &bits, 4);
      } else {
        value = reinterpret_cast<const float*>(values)[at];
      }
      for (int r = 0; r < rows; ++r) out[r * dim + i] += weights[r * kChunk + t] * value;
    }
  }
}

template <int MR>
void mix_rows(CacheType type, const uint8_t* values, Ahead& ahead, int dim, const float* weights, int n, float* out) {
  constexpr int kWide = kMixVectors / MR >= 8 ? 8 : kMixVectors / MR >= 4 ? 4 : kMixVectors / MR >= 2 ? 2 : 1;
  int j = 0;
  for (; j + kWide * kLanes <= dim; j += kWide * kLanes) mix<MR, kWide>(type, values, ahead, dim, j, weights, n, out);
  for (; j + kLanes <= dim; j += kLanes) mix<MR, 1>(type, values, ahead, dim, j, weights, n, out);
  if (j < dim) mix_tail(type, values, dim, j, MR, weights, n, out);
}

void mix_all(CacheType type, const uint8_t* values, Ahead& ahead, int dim, int rows, const float* weights, int n, float* out) {
  int r = 0;
  if constexpr (kMixVectors >= 16) {
    for (; r + 4 <= rows; r += 4) mix_rows<4>(type, values, ahead, dim, weights + r * kChunk, n, out + r * dim);
  }
  for (; r + 2 <= rows; r += 2) mix_rows<2>(type, values, ahead, dim, weights + r * kChunk, n, out + r * dim);
  if (r < rows) mix_rows<1>(type, values, ahead, dim, weights + r * kChunk, n, out + r * dim);
}

// The values of a block as float, for rows that would convert them again and again.
void widen(CacheType type, const uint8_t* values, int dim, int n, float* out) {
  for (int i = 0; i < n * dim; i += kLanes) f_store(out + i, value_at(type, values, i));
}

// Weights of one chunk as whole numbers of 14 bits, in two digits of 7, so that values of 8 bits can be
// multiplied as such: what is lost is at most 2^-15 of the chunk's largest weight.
struct Digits {
  uint8_t* high;  // [rows][kChunk]
  uint8_t* low;
  float* scales;  // [rows] of the whole numbers
};

constexpr float kLargest = 127.0f * 128.0f + 127.0f;

// One row of weights, times the scales of the values. A hidden token has weight 0, whatever its scale is.
void split_row(float* weights, const float* scales, int num, int r, const Digits& d) {
  F top = f_zero();
  for (int i = 0; i < num; i += kLanes) {
    const F p = f_load(weights + i);
    const F w = f_zero_where_below(f_mul(p, f_load(scales + i)), p, f_set(FLT_MIN));
    top = f_max(top, w);
    f_store(weights + i, w);
  }
  const float most = f_top(top);
  const bool is_nothing = most < 1e-34f;  // the factor would be infinite
  const F factor = f_set(is_nothing ? 0.0f : kLargest / most), to_high = f_set(1.0f / 128.0f);
  d.scales[r] = is_nothing ? 0.0f : most / kLargest;
  for (int i = 0; i < num; i += kLanes) {
    const F whole = f_round(f_mul(f_load(weights + i), factor));
    const F high = f_floor(f_mul(whole, to_high));
    i_store_s8(reinterpret_cast<int8_t*>(d.high) + r * kChunk + i, i_nearest(high));
    i_store_s8(reinterpret_cast<int8_t*>(d.low) + r * kChunk + i, i_nearest(f_fnma(high, f_set(128.0f), whole)));
  }
}

// out[r][j ...] += weights * values over the blocks of a chunk, NV vectors of dims at once.
template <int MR, int NV>
void mix_i8(const uint8_t* const* values, Ahead& ahead, int blocks, int dim, int j, int r0,
            const Digits& d, float* out) {
  I high[MR][NV], low[MR][NV];
  Ahead fetching = ahead;
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) high[r][v] = low[r][v] = i_zero();
  }
  for (int b = 0; b < blocks; ++b) {
    for (int t = 0; t < kLanes; t += 4) {
      const int64_t at = (int64_t{t} * dim) + 4 * j;
      B four[NV];
      for (int v = 0; v < NV; ++v) four[v] = b_load(values[b] + at + 64 * v);
      fetching.fetch<NV>();
      for (int r = 0; r < MR; ++r) {
        const int64_t from = (r0 + r) * kChunk + b * kLanes + t;
        const int32_t h = four_bytes(reinterpret_cast<const int8_t*>(d.high) + from);
        const int32_t l = four_bytes(reinterpret_cast<const int8_t*>(d.low) + from);
        for (int v = 0; v < NV; ++v) {
          high[r][v] = dot_s8(high[r][v], h, four[v]);
          low[r][v] = dot_s8(low[r][v], l, four[v]);
        }
      }
    }
  }
  ahead = fetching;
  for (int r = 0; r < MR; ++r) {
    const F scale = f_set(d.scales[r0 + r]);
    for (int v = 0; v < NV; ++v) {
      float* to = out + (r0 + r) * dim + j + v * kLanes;
      const int n = dim - j - v * kLanes;
      const F sum = f_fma(f_int(high[r][v]), f_set(128.0f), f_int(low[r][v]));
      f_store_n(to, f_fma(sum, scale, f_load_n(to, n)), n);
    }
  }
}

template <int MR>
void mix_rows_i8(const uint8_t* const* values, Ahead& ahead, int blocks, int dim, int r0,
                 const Digits& d, float* out) {
  constexpr int kWide = kMixVectors / (2 * MR) > 0 ? kMixVectors / (2 * MR) : 1;
  int j = 0;
  for (; j + kWide * kLanes <= dim; j += kWide * kLanes) mix_i8<MR, kWide>(values, ahead, blocks, dim, j, r0, d, out);
  for (; j < dim; j += kLanes) mix_i8<MR, 1>(values, ahead, blocks, dim, j, r0, d, out);
}

// Values are the first `latent` dims of the keys, which lie as [dim / 4][16 tokens][4], value + 128. Laid
// out as values: [4][latent][4 tokens].
void turn_latent(const uint8_t* keys, int latent, uint8_t* values) {
  int h = 0;
  for (; h + 16 <= latent; h += 16) b_turn(keys + h * kLanes, values + 4 * h, 4 * int64_t{latent});
  for (; h < latent; ++h) {
    for (int t = 0; t < kLanes; ++t) {
      values[(t / 4 * latent + h) * 4 + t % 4] = static_cast<uint8_t>(keys[(h / 4 * kLanes + t) * 4 + h % 4] ^ 128);
    }
  }
}

// `seen[r]`: tokens of the block that row r sees; in other slots may stand NaN, and 0 * NaN is NaN.
void mix_latent_plain(CacheType type, const uint8_t* keys, const float* weights, const int64_t* seen, int rows,
                      int latent, float* out) {
  alignas(64) float lanes[kLanes];
  for (int h = 0; h < latent; ++h) {
    f_store(lanes, value_at(type, keys, int64_t{h} * kLanes));
    for (int r = 0; r < rows; ++r) {
      out[r * latent + h] += f_sum(f_mul(f_load_n(lanes, seen[r]), f_load(weights + r * kChunk)));
    }
  }
}

}  // namespace
}  // namespace mxn::MXN_NS
