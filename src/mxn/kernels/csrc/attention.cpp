// Attention of some query rows over one head of the paged cache, 64 tokens at a time.
//
// With a unified maximum (margin > 0) every row subtracts the same phi, so that ranges of tokens never
// have to be rescaled or compared; a row whose maximum leaves phi +- margin is flagged and computed
// again with its own. Source: FlashDecoding++, arXiv 2311.01282, section 3. The rows of a call are the
// query heads that share a key/value head, times some tokens of a prompt: keys are read once for all.
#include "common.h"
#include "vec.h"

namespace mxn::MXN_NS {
namespace {

constexpr float kNothing = -3.0e38f;  // score of what a row must not see; exp of it is 0

struct Chunk {
  int64_t begin = 0, end = 0;  // tokens; begin is a multiple of 16
  int blocks() const { return static_cast<int>((end - begin + kLanes - 1) / kLanes); }
};

const uint8_t* block_at(const Attend& c, int64_t token) {
  const CacheShape& s = c.shape;
  return c.cache + s.block_start(c.pages[token / s.page_tokens], token % s.page_tokens, c.head);
}

// The block that is wanted `kAhead` blocks later, fetched line by line beside the work on `token`'s: pages
// lie anywhere and keys and values take turns, so the processor cannot guess. Behind the last block of a
// call come the first ones of the next.
constexpr int64_t kAhead = kChunk / kLanes;

inline const uint8_t* block_ahead(const Attend& c, int64_t token) {
  const CacheShape& s = c.shape;
  const int64_t ahead = token + kAhead * kLanes;
  if (ahead < c.end) return block_at(c, ahead);
  const int64_t last = c.begin + (c.end - c.begin + kLanes - 1) / kLanes * kLanes;
  const int64_t next = c.next_begin + (ahead > last ? ahead - last : 0);
  if (next >= c.next_end) return block_at(c, token);
  return c.cache + s.block_start(c.next_pages[next / s.page_tokens], next % s.page_tokens, c.next_head);
}

inline void prefetch_bytes(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

struct Query {
  const int8_t* q;       // [rows, k_dim]
  const float* scales;   // [rows] of q, times the softmax scale
  const int32_t* isums;  // [rows]
};

template <int MR>
void score_i8(const Attend& c, const Query& q, int r0, const uint8_t* block, float* out) {
  const int dim = c.shape.k_dim;
  I sum[MR];
  for (int r = 0; r < MR; ++r) sum[r] = i_set(-128 * q.isums[r0 + r]);
  for (int h = 0; h < dim; h += 4) {
    const B keys = b_load(block + h * kLanes);
    for (int r = 0; r < MR; ++r) sum[r] = dot_u8(sum[r], keys, four_bytes(q.q + (r0 + r) * dim + h));
  }
  const F scale = f_load(reinterpret_cast<const float*>(block + c.shape.scale_offset()));
  for (int r = 0; r < MR; ++r) {
    f_store(out + r * kChunk, f_mul(f_mul(f_int(sum[r]), scale), f_set(q.scales[r0 + r])));
  }
}

// Two blocks at once: a few rows alone would wait for the latency of their own sums.
template <int MR>
void score_pair_i8(const Attend& c, const Query& q, int64_t token, float* out) {
  const uint8_t *one = block_at(c, token), *two = block_at(c, token + kLanes);
  const uint8_t *one_ahead = block_ahead(c, token), *two_ahead = block_ahead(c, token + kLanes);
  const int dim = c.shape.k_dim;
  I first[MR], second[MR];
  for (int r = 0; r < MR; ++r) first[r] = second[r] = i_set(-128 * q.isums[r]);
  for (int h = 0; h < dim; h += 4) {
    const B a = b_load(one + h * kLanes), b = b_load(two + h * kLanes);
    prefetch(one_ahead + h * kLanes);
    prefetch(two_ahead + h * kLanes);
    for (int r = 0; r < MR; ++r) {
      const int32_t four = four_bytes(q.q + r * dim + h);
      first[r] = dot_u8(first[r], a, four);
      second[r] = dot_u8(second[r], b, four);
    }
  }
  const F x = f_load(reinterpret_cast<const float*>(one + c.shape.scale_offset()));
  const F y = f_load(reinterpret_cast<const float*>(two + c.shape.scale_offset()));
  for (int r = 0; r < MR; ++r) {
    const F scale = f_set(q.scales[r]);
    f_store(out + r * kChunk, f_mul(f_mul(f_int(first[r]), x), scale));
    f_store(out + r * kChunk + kLanes, f_mul(f_mul(f_int(second[r]), y), scale));
  }
}

// Scores the blocks of `token` and of 16 tokens later; false where single blocks are as good.
bool score_pair(const Attend& c, const Query& q, int64_t token, float* out) {
  if (c.shape.type != CacheType::i8 || kTileRows < 8) return false;
  switch (c.num_rows) {
    case 1: score_pair_i8<1>(c, q, token, out); return true;
    case 2: score_pair_i8<2>(c, q, token, out); return true;
    case 3: score_pair_i8<3>(c, q, token, out); return true;
    case 4: score_pair_i8<4>(c, q, token, out); return true;
    default: return false;
  }
}

template <int MR, bool IS_BF16>
void score_plain(const Attend& c, int r0, const uint8_t* block, float* out) {
  const int dim = c.shape.k_dim;
  F sum[MR];
  for (int r = 0; r < MR; ++r) sum[r] = f_zero();
  for (int h = 0; h < dim; ++h) {
    const F keys = IS_BF16 ? f_bf16(reinterpret_cast<const uint16_t*>(block) + h * kLanes)
                           : f_load(reinterpret_cast<const float*>(block) + h * kLanes);
    for (int r = 0; r < MR; ++r) sum[r] = f_fma(keys, f_set(c.q[(r0 + r) * dim + h]), sum[r]);
  }
  for (int r = 0; r < MR; ++r) f_store(out + r * kChunk, f_mul(sum[r], f_set(c.scale)));
}

template <int MR>
void score_rows(const Attend& c, const Query& q, int r0, const uint8_t* block, float* out) {
  switch (c.shape.type) {
    case CacheType::i8: return score_i8<MR>(c, q, r0, block, out);
    case CacheType::bf16: return score_plain<MR, true>(c, r0, block, out);
    case CacheType::f32: return score_plain<MR, false>(c, r0, block, out);
  }
}

void score_block(const Attend& c, const Query& q, const uint8_t* block, float* out) {
  int r = 0;
  if constexpr (kTileRows >= 8) {
    for (; r + 8 <= c.num_rows; r += 8) score_rows<8>(c, q, r, block, out + r * kChunk);
    for (; r + 4 <= c.num_rows; r += 4) score_rows<4>(c, q, r, block, out + r * kChunk);
  }
  for (; r + 2 <= c.num_rows; r += 2) score_rows<2>(c, q, r, block, out + r * kChunk);
  if (r < c.num_rows) score_rows<1>(c, q, r, block, out + r * kChunk);
}

// Hides what row r must not see, so that even a NaN in a slot nobody owns cannot reach a result.
void mask(const Attend& c, const Chunk& chunk, int r, float* row) {
  const int64_t limit = c.limits[r] < chunk.end ? c.limits[r] : chunk.end;
  const int64_t low = c.window ? c.limits[r] - c.window : 0;
  const int64_t num = int64_t{chunk.blocks()} * kLanes;
  if (low <= chunk.begin && limit >= chunk.begin + num) return;
  for (int64_t i = 0; i < num; ++i) {
    const int64_t token = chunk.begin + i;
    if (token >= limit || token < low) row[i] = kNothing;
  }
}

void soften(const Attend& c, int num, float* row) {
  if (c.softcap == 0.0f) return;
  const F inverse = f_set(1.0f / c.softcap), cap = f_set(c.softcap);
  for (int i = 0; i < num; i += kLanes) f_store(row + i, f_mul(cap, f_tanh(f_mul(f_load(row + i), inverse))));
}

float top_of(const float* row, int num) {
  F top = f_load(row);
  for (int i = kLanes; i < num; i += kLanes) top = f_max(top, f_load(row + i));
  return f_top(top);
}

// Turns scores into weights exp(score - reference); returns their sum. A maximum can lose a NaN, the sum
// keeps it.
float weigh(float reference, int num, float* row) {
  const F ref = f_set(reference);
  F sum = f_zero();
  for (int i = 0; i < num; i += kLanes) {
    const F p = f_exp(f_sub(f_load(row + i), ref));
    sum = f_add(sum, p);
    f_store(row + i, p);
  }
  return f_sum(sum);
}

inline F value_at(CacheType type, const uint8_t* p, int64_t i) {
  if (type == CacheType::bf16) return f_bf16(reinterpret_cast<const uint16_t*>(p) + i);
  return f_load(reinterpret_cast<const float*>(p) + i);
}

// sums[r][v] += weight * value over the tokens of one block. `n` of its 16 tokens exist.
template <int MR, int NV>
void mix(CacheType type, const uint8_t* values, const uint8_t* ahead, int dim, int j, const float* weights, int n,
         float* out) {
  F sum[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) sum[r][v] = f_load(out + r * dim + j + v * kLanes);
  }
  for (int t = 0; t < n; ++t) {
    F row[NV];
    for (int v = 0; v < NV; ++v) row[v] = value_at(type, values, int64_t{t} * dim + j + v * kLanes);
    if constexpr (NV == 8) {  // 128 dims: two lines of bytes
      prefetch(ahead + int64_t{t} * dim + j);
      prefetch(ahead + int64_t{t} * dim + j + 64);
    }
    for (int r = 0; r < MR; ++r) {
      const F weight = f_set(weights[r * kChunk + t]);
      for (int v = 0; v < NV; ++v) sum[r][v] = f_fma(row[v], weight, sum[r][v]);
    }
  }
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
void mix_rows(CacheType type, const uint8_t* values, const uint8_t* ahead, int dim, const float* weights, int n, float* out) {
  constexpr int kWide = kMixVectors / MR >= 8 ? 8 : kMixVectors / MR >= 4 ? 4 : kMixVectors / MR >= 2 ? 2 : 1;
  int j = 0;
  for (; j + kWide * kLanes <= dim; j += kWide * kLanes) mix<MR, kWide>(type, values, ahead, dim, j, weights, n, out);
  for (; j + kLanes <= dim; j += kLanes) mix<MR, 1>(type, values, ahead, dim, j, weights, n, out);
  if (j < dim) mix_tail(type, values, dim, j, MR, weights, n, out);
}

void mix_all(CacheType type, const uint8_t* values, const uint8_t* ahead, int dim, int rows, const float* weights, int n, float* out) {
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
    const F w = f_zero_where_below(f_mul(p, f_load(scales + i)), p, f_set(1e-38f));
    top = f_max(top, w);
    f_store(weights + i, w);
  }
  const float most = f_top(top);
  const bool is_nothing = most < 1e-32f;  // the factor would be infinite
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
void mix_i8(const uint8_t* const* values, const uint8_t* const* ahead, int blocks, int dim, int j, int r0,
            const Digits& d, float* out) {
  I high[MR][NV], low[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) high[r][v] = low[r][v] = i_zero();
  }
  for (int b = 0; b < blocks; ++b) {
    for (int t = 0; t < kLanes; t += 4) {
      const int64_t at = (int64_t{t} * dim) + 4 * j;
      B four[NV];
      for (int v = 0; v < NV; ++v) {
        four[v] = b_load(values[b] + at + 64 * v);
        prefetch(ahead[b] + at + 64 * v);
      }
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
void mix_rows_i8(const uint8_t* const* values, const uint8_t* const* ahead, int blocks, int dim, int r0,
                 const Digits& d, float* out) {
  constexpr int kWide = kMixVectors / (2 * MR) > 0 ? kMixVectors / (2 * MR) : 1;
  int j = 0;
  for (; j + kWide * kLanes <= dim; j += kWide * kLanes) mix_i8<MR, kWide>(values, ahead, blocks, dim, j, r0, d, out);
  for (; j < dim; j += kLanes) mix_i8<MR, 1>(values, ahead, blocks, dim, j, r0, d, out);
}

// Values are the first `latent` dims of the keys, which lie as [dim / 4][16 tokens][4].
void mix_latent_i8(const uint8_t* keys, const float* weights, int rows, int latent, const float* sums, float* out) {
  for (int r = 0; r < rows; ++r) {
    F weight[4];
    for (int i = 0; i < 4; ++i) weight[i] = f_repeat4(weights + r * kChunk + 4 * i);
    const float offset = -128.0f * sums[r];
    for (int h = 0; h < latent; h += 4) {
      const uint8_t* p = keys + h * kLanes;
      F sum = f_mul(f_u8(p), weight[0]);
      for (int i = 1; i < 4; ++i) sum = f_fma(f_u8(p + 16 * i), weight[i], sum);
      float four[4];
      f_sum4(four, sum);
      for (int i = 0; i < 4; ++i) out[r * latent + h + i] += four[i] + offset;
    }
  }
}

void mix_latent_plain(CacheType type, const uint8_t* keys, const float* weights, int n, int rows, int latent,
                      float* out) {
  alignas(64) float lanes[kLanes];
  for (int h = 0; h < latent; ++h) {
    f_store(lanes, value_at(type, keys, int64_t{h} * kLanes));
    const F tokens = f_load_n(lanes, n);  // a slot nobody wrote may hold NaN, and 0 * NaN is NaN
    for (int r = 0; r < rows; ++r) out[r * latent + h] += f_sum(f_mul(tokens, f_load(weights + r * kChunk)));
  }
}

struct Work {
  float* scores;   // [rows][kChunk]
  float* values;   // [16][v_dim] of one block, widened
  int8_t* q;       // [rows][k_dim]
  float* q_scales; // [rows]
  int32_t* q_isums;
  Digits digits;
};

Work carve(const Attend& c) {
  Work w;
  float* p = c.scratch;
  w.scores = p, p += kMaxQueryRows * kChunk;
  w.values = p, p += kLanes * (c.shape.v_dim + kLanes);
  w.q_scales = p, p += kMaxQueryRows;
  w.q_isums = reinterpret_cast<int32_t*>(p), p += kMaxQueryRows;
  w.digits.scales = p, p += kMaxQueryRows;
  w.digits.high = reinterpret_cast<uint8_t*>(p), p += kMaxQueryRows * kChunk / 4;
  w.digits.low = reinterpret_cast<uint8_t*>(p), p += kMaxQueryRows * kChunk / 4;
  w.q = reinterpret_cast<int8_t*>(p);
  return w;
}

void quantize_queries(const Attend& c, const Work& w) {
  const int dim = c.shape.k_dim;
  for (int r = 0; r < c.num_rows; ++r) {
    const float* q = c.q + int64_t{r} * dim;
    const Step step = int8_step(q, dim);
    const F factor = f_set(step.factor);
    I sum = i_zero();
    int8_t lanes[kLanes];
    for (int i = 0; i < dim; i += kLanes) {
      const I v = step.factor == 0.0f ? i_zero() : i_nearest(f_mul(f_load_n(q + i, dim - i), factor));
      sum = i_add(sum, v);
      i_store_s8(lanes, v);
      std::memcpy(w.q + r * dim + i, lanes, static_cast<size_t>(dim - i < kLanes ? dim - i : kLanes));
    }
    w.q_isums[r] = i_sum(sum);
    w.q_scales[r] = step.scale * c.scale;
  }
}

void mix_latent(const Attend& c, const Work& w, const Chunk& chunk) {
  const CacheShape& s = c.shape;
  for (int b = 0; b < chunk.blocks(); ++b) {
    const int64_t token = chunk.begin + b * kLanes;
    const uint8_t* block = block_at(c, token);
    const int n = static_cast<int>(chunk.end - token < kLanes ? chunk.end - token : kLanes);
    float* weights = w.scores + b * kLanes;
    if (s.type != CacheType::i8) {
      mix_latent_plain(s.type, block, weights, n, c.num_rows, s.latent, c.out);
      continue;
    }
    const F scale = f_load_n(reinterpret_cast<const float*>(block + s.scale_offset()), n);
    float sums[kMaxQueryRows];
    for (int r = 0; r < c.num_rows; ++r) {
      const F p = f_load(weights + r * kChunk);  // 0 where hidden, and then whatever the scale is
      const F v = f_zero_where_below(f_mul(p, scale), p, f_set(1e-38f));
      sums[r] = f_sum(v);
      f_store(weights + r * kChunk, v);
    }
    mix_latent_i8(block, weights, c.num_rows, s.latent, sums, c.out);
  }
}

void mix_chunk_i8(const Attend& c, const Work& w, const Chunk& chunk) {
  const CacheShape& s = c.shape;
  const uint8_t *values[kChunk / kLanes], *ahead[kChunk / kLanes];
  alignas(64) float scales[kChunk];
  const int blocks = chunk.blocks(), num = blocks * kLanes;
  float fault = 0.0f;
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* block = block_at(c, chunk.begin + b * kLanes);
    values[b] = block + s.value_offset();
    ahead[b] = block_ahead(c, chunk.begin + b * kLanes) + s.value_offset();
    const F v = f_load(reinterpret_cast<const float*>(block + s.scale_offset()) + kLanes);
    f_store(scales + b * kLanes, v);
    fault += f_sum(f_sub(v, v));
  }
  for (int r = 0; r < c.num_rows; ++r) {
    float* weights = w.scores + r * kChunk;
    if (fault != 0.0f) {  // a scale of values is NaN; whoever sees that token must know
      for (int i = 0; i < num; ++i) {
        if (weights[i] > 0.0f && !(scales[i] - scales[i] == 0.0f)) c.den[r] = NAN;
      }
    }
    split_row(weights, scales, num, r, w.digits);
  }
  int r = 0;
  if constexpr (kMixVectors >= 16) {
    for (; r + 4 <= c.num_rows; r += 4) mix_rows_i8<4>(values, ahead, blocks, s.v_dim, r, w.digits, c.out);
  }
  for (; r + 2 <= c.num_rows; r += 2) mix_rows_i8<2>(values, ahead, blocks, s.v_dim, r, w.digits, c.out);
  if (r < c.num_rows) mix_rows_i8<1>(values, ahead, blocks, s.v_dim, r, w.digits, c.out);
}

bool is_seen_by_all(const Attend& c, int64_t begin, int64_t end) {
  for (int r = 0; r < c.num_rows; ++r) {
    if (c.limits[r] < end || (c.window && c.limits[r] - c.window > begin)) return false;
  }
  return true;
}

// A block that some rows see a part of, row by row: 0 times a NaN that a row must not see would be NaN.
void mix_each(const Attend& c, int64_t token, int n, const uint8_t* values, const float* weights) {
  const CacheShape& s = c.shape;
  for (int r = 0; r < c.num_rows; ++r) {
    const int64_t low = c.window ? c.limits[r] - c.window - token : 0, high = c.limits[r] - token;
    const int first = static_cast<int>(low > 0 ? low : 0), last = static_cast<int>(high < n ? high : n);
    if (first >= last) continue;
    const uint8_t* from = values + first * s.v_dim * s.item();
    mix_all(s.type, from, from, s.v_dim, 1, weights + r * kChunk + first, last - first, c.out + r * s.v_dim);
  }
}

void mix_chunk(const Attend& c, const Work& w, const Chunk& chunk) {
  const CacheShape& s = c.shape;
  if (s.v_dim == 0) return mix_latent(c, w, chunk);
  if (s.type == CacheType::i8) return mix_chunk_i8(c, w, chunk);
  for (int b = 0; b < chunk.blocks(); ++b) {
    const int64_t token = chunk.begin + b * kLanes;
    const int n = static_cast<int>(chunk.end - token < kLanes ? chunk.end - token : kLanes);
    const float* weights = w.scores + b * kLanes;
    const uint8_t* values = block_at(c, token) + s.value_offset();
    const uint8_t* ahead = block_ahead(c, token) + s.value_offset();
    if (!is_seen_by_all(c, token, token + n)) {
      mix_each(c, token, n, values, weights);
    } else if (c.num_rows > 4 && s.type == CacheType::bf16) {
      widen(s.type, values, s.v_dim, n, w.values);
      mix_all(CacheType::f32, reinterpret_cast<const uint8_t*>(w.values), ahead, s.v_dim, c.num_rows, weights, n, c.out);
    } else {
      mix_all(s.type, values, ahead, s.v_dim, c.num_rows, weights, n, c.out);
    }
  }
}

}  // namespace

void attend(const Attend& c) {
  const Work w = carve(c);
  const CacheShape& s = c.shape;
  const int out_dim = s.v_dim ? s.v_dim : s.latent;
  const bool is_unified = c.margin > 0.0f;
  if (s.type == CacheType::i8) quantize_queries(c, w);
  const Query q{w.q, w.q_scales, w.q_isums};
  float top[kMaxQueryRows];
  for (int r = 0; r < c.num_rows; ++r) {
    c.den[r] = 0.0f;
    c.ref[r] = is_unified ? c.phi : kNothing;
    c.flag[r] = 0;
    top[r] = kNothing;
  }
  for (int64_t i = 0; i < int64_t{c.num_rows} * out_dim; ++i) c.out[i] = 0.0f;
  if (c.is_first) {  // nothing came before that could have fetched the first blocks
    for (int64_t token = c.begin; token < c.begin + kChunk && token < c.end; token += kLanes) {
      prefetch_bytes(block_at(c, token), s.block_bytes());
    }
  }
  for (Chunk chunk{c.begin, 0}; chunk.begin < c.end; chunk.begin = chunk.end) {
    chunk.end = chunk.begin + kChunk < c.end ? chunk.begin + kChunk : c.end;
    const int num = chunk.blocks() * kLanes;
    for (int b = 0; b < chunk.blocks(); ++b) {
      const int64_t token = chunk.begin + b * kLanes;
      if (b % 2 == 0 && b + 1 < chunk.blocks() &&
          score_pair(c, q, token, w.scores + b * kLanes)) {
        ++b;
        continue;
      }
      score_block(c, q, block_at(c, token), w.scores + b * kLanes);
    }
    for (int r = 0; r < c.num_rows; ++r) {
      float* row = w.scores + r * kChunk;
      soften(c, num, row);
      mask(c, chunk, r, row);
      const float most = top_of(row, num);
      top[r] = most > top[r] ? most : top[r];
      if (!is_unified && top[r] > c.ref[r]) {
        const float shrink = c.ref[r] == kNothing ? 0.0f : std::exp(c.ref[r] - top[r]);
        c.den[r] *= shrink;
        for (int j = 0; j < out_dim; ++j) c.out[r * out_dim + j] *= shrink;
        c.ref[r] = top[r];
      }
      c.den[r] += weigh(c.ref[r] == kNothing ? 0.0f : c.ref[r], num, row);
    }
    mix_chunk(c, w, chunk);
  }
  for (int r = 0; r < c.num_rows; ++r) {
    // A range that a row sees nothing of (top still kNothing) contributes zeros, whatever phi.
    const bool is_out = top[r] > c.phi + c.margin || top[r] < c.phi - c.margin;
    if (is_unified && is_out && top[r] != kNothing) c.flag[r] = 1;
  }
}

void cache_write(const CacheShape& s, uint8_t* cache, const int64_t* pages, int64_t position, int head,
                 const float* k, const float* v) {
  const int64_t slot = position % kLanes;
  uint8_t* block = cache + s.block_start(pages[position / s.page_tokens], position % s.page_tokens, head);
  if (s.type != CacheType::i8) {
    for (int h = 0; h < s.k_dim; ++h) {
      if (s.type == CacheType::f32) {
        reinterpret_cast<float*>(block)[h * kLanes + slot] = k[h];
      } else {
        alignas(64) float one[kLanes] = {k[h]};
        uint16_t bits[kLanes];
        f_store_bf16(bits, f_load(one));
        reinterpret_cast<uint16_t*>(block)[h * kLanes + slot] = bits[0];
      }
    }
    uint8_t* values = block + s.value_offset();
    for (int j = 0; j < s.v_dim; j += kLanes) {
      const F x = f_load_n(v + j, s.v_dim - j);
      const int n = s.v_dim - j < kLanes ? s.v_dim - j : kLanes;
      if (s.type == CacheType::f32) {
        f_store_n(reinterpret_cast<float*>(values) + slot * s.v_dim + j, x, n);
      } else {
        uint16_t bits[kLanes];
        f_store_bf16(bits, x);
        std::memcpy(values + 2 * (slot * s.v_dim + j), bits, static_cast<size_t>(2 * n));
      }
    }
    return;
  }
  // 16 values from x as int8; what is not there reads as 0.
  auto take = [](const float* x, int n, const Step& step, int8_t* to) {
    i_store_s8(to, step.factor == 0.0f ? i_zero() : i_nearest(f_mul(f_load_n(x, n), f_set(step.factor))));
  };
  float* scales = reinterpret_cast<float*>(block + s.scale_offset());
  int8_t lanes[kLanes];
  const Step key_step = int8_step(k, s.k_dim);
  scales[slot] = key_step.scale;
  for (int h = 0; h < s.k_dim; h += kLanes) {
    take(k + h, s.k_dim - h, key_step, lanes);
    const int n = s.k_dim - h < kLanes ? s.k_dim - h : kLanes;
    for (int i = 0; i < n; ++i) {
      block[((h + i) / 4 * kLanes + slot) * 4 + (h + i) % 4] = static_cast<uint8_t>(lanes[i] + 128);
    }
  }
  if (s.v_dim == 0) return;
  const Step value_step = int8_step(v, s.v_dim);
  scales[kLanes + slot] = value_step.scale;
  uint8_t* values = block + s.value_offset();
  for (int j = 0; j < s.v_dim; j += kLanes) {
    take(v + j, s.v_dim - j, value_step, lanes);
    const int n = s.v_dim - j < kLanes ? s.v_dim - j : kLanes;
    uint8_t* to = values + (slot / 4 * s.v_dim + j) * 4 + slot % 4;
    for (int i = 0; i < n; ++i) to[4 * i] = static_cast<uint8_t>(lanes[i]);
  }
}

}  // namespace mxn::MXN_NS
