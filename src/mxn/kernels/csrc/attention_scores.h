// Scores of query rows against one block of keys.
#pragma once
#include "attention_blocks.h"

namespace mxn::MXN_NS {
namespace {

struct Query {
  const int8_t* q;       // [rows, k_dim]
  const float* scales;   // [rows] of q, times the softmax scale
  const int32_t* isums;  // [rows]
};

template <int MR>
void score_i8(const Attend& c, const Query& q, int r0, const uint8_t* block, Ahead& ahead, float* out) {
  const int dim = c.shape.k_dim;
  Ahead fetching = ahead;
  I sum[MR];
  for (int r = 0; r < MR; ++r) sum[r] = i_set(-128 * q.isums[r0 + r]);
  for (int h = 0; h < dim; h += 4) {
    const B keys = b_load(block + h * kLanes);
    fetching.fetch<1>();
    for (int r = 0; r < MR; ++r) sum[r] = dot_u8(sum[r], keys, four_bytes(q.q + (r0 + r) * dim + h));
  }
  ahead = fetching;
  const F scale = f_load(reinterpret_cast<const float*>(block + c.shape.scale_offset()));
  for (int r = 0; r < MR; ++r) {
    f_store(out + r * kChunk, f_mul(f_mul(f_int(sum[r]), scale), f_set(q.scales[r0 + r])));
  }
}

// Two blocks at once: a few rows alone would wait for the latency of their own sums.
template <int MR>
void score_pair_i8(const Attend& c, const Query& q, int64_t token, Ahead& ahead, float* out) {
  const uint8_t *one = block_at(c, token), *two = block_at(c, token + kLanes);
  const int dim = c.shape.k_dim;
  Ahead fetching = ahead;  // a copy can stay in registers
  I first[MR], second[MR];
  for (int r = 0; r < MR; ++r) first[r] = second[r] = i_set(-128 * q.isums[r]);
  for (int h = 0; h < dim; h += 4) {
    const B a = b_load(one + h * kLanes), b = b_load(two + h * kLanes);
    fetching.fetch<2>();
    for (int r = 0; r < MR; ++r) {
      const int32_t four = four_bytes(q.q + r * dim + h);
      first[r] = dot_u8(first[r], a, four);
      second[r] = dot_u8(second[r], b, four);
    }
  }
  fetching.fetch<4>();  // the scales
  ahead = fetching;
  const F x = f_load(reinterpret_cast<const float*>(one + c.shape.scale_offset()));
  const F y = f_load(reinterpret_cast<const float*>(two + c.shape.scale_offset()));
  for (int r = 0; r < MR; ++r) {
    const F scale = f_set(q.scales[r]);
    f_store(out + r * kChunk, f_mul(f_mul(f_int(first[r]), x), scale));
    f_store(out + r * kChunk + kLanes, f_mul(f_mul(f_int(second[r]), y), scale));
  }
}

// Scores the blocks of `token` and of 16 tokens later; false where single blocks are as good.
bool score_pair(const Attend& c, const Query& q, int64_t token, Ahead& ahead, float* out) {
  if (c.shape.type != CacheType::i8 || kTileRows < 8) return false;
  switch (c.num_rows) {
    case 1: score_pair_i8<1>(c, q, token, ahead, out); return true;
    case 2: score_pair_i8<2>(c, q, token, ahead, out); return true;
    case 3: score_pair_i8<3>(c, q, token, ahead, out); return true;
    case 4: score_pair_i8<4>(c, q, token, ahead, out); return true;
    default: return false;
  }
}

template <int MR, bool IS_BF16>
void score_plain(const Attend& c, int r0, const uint8_t* block, Ahead& ahead, float* out) {
  const int dim = c.shape.k_dim;
  Ahead fetching = ahead;
  F sum[MR];
  for (int r = 0; r < MR; ++r) sum[r] = f_zero();
  for (int h = 0; h < dim; ++h) {
    const F keys = IS_BF16 ? f_bf16(reinterpret_cast<const uint16_t*>(block) + h * kLanes)
                           : f_load(reinterpret_cast<const float*>(block) + h * kLanes);
    if (!IS_BF16 || h % 2 == 0) fetching.fetch<1>();
    for (int r = 0; r < MR; ++r) sum[r] = f_fma(keys, f_set(c.q[(r0 + r) * dim + h]), sum[r]);
  }
  ahead = fetching;
  for (int r = 0; r < MR; ++r) f_store(out + r * kChunk, f_mul(sum[r], f_set(c.scale)));
}

template <int MR>
void score_rows(const Attend& c, const Query& q, int r0, const uint8_t* block, Ahead& ahead, float* out) {
  switch (c.shape.type) {
    case CacheType::i8: return score_i8<MR>(c, q, r0, block, ahead, out);
    case CacheType::bf16: return score_plain<MR, true>(c, r0, block, ahead, out);
    case CacheType::f32: return score_plain<MR, false>(c, r0, block, ahead, out);
  }
}

void score_block(const Attend& c, const Query& q, const uint8_t* block, Ahead& ahead, float* out) {
  int r = 0;
  if constexpr (kTileRows >= 8) {
    for (; r + 8 <= c.num_rows; r += 8) score_rows<8>(c, q, r, block, ahead, out + r * kChunk);
    for (; r + 4 <= c.num_rows; r += 4) score_rows<4>(c, q, r, block, ahead, out + r * kChunk);
  }
  for (; r + 2 <= c.num_rows; r += 2) score_rows<2>(c, q, r, block, ahead, out + r * kChunk);
  if (r < c.num_rows) score_rows<1>(c, q, r, block, ahead, out + r * kChunk);
}

}  // namespace
}  // namespace mxn::MXN_NS
