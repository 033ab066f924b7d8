// Attention of some query rows over one head of the paged cache, 64 tokens at a time.
//
// With a unified maximum (margin > 0) every row subtracts the same phi, so that ranges of tokens never
// have to be rescaled or compared; a row whose maximum leaves phi +- margin is flagged and computed
// again with its own. Source: FlashDecoding++, arXiv 2311.01282, section 3. The rows of a call are the
// query heads that share a key/value head, times some tokens of a prompt: keys are read once for all.
#include "attention_scores.h"
#include "attention_values.h"

namespace mxn::MXN_NS {
namespace {

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

struct Work {
  float* scores;   // [rows][kChunk]
  float* values;   // [16][v_dim] of one block, widened
  int8_t* q;       // [rows][k_dim]
  float* q_scales; // [rows]
  int32_t* q_isums;
  Digits digits;
  uint8_t* turned; // [kChunk][latent], where values are a part of the keys
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
  w.turned = reinterpret_cast<uint8_t*>(p), p += kChunk * c.shape.latent / 4;
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
    int64_t seen[kMaxQueryRows];
    for (int r = 0; r < c.num_rows; ++r) {
      const int64_t end = c.limits[r] < chunk.end ? c.limits[r] : chunk.end;
      seen[r] = end < token ? 0 : end - token;
    }
    mix_latent_plain(s.type, block_at(c, token), w.scores + b * kLanes, seen, c.num_rows, s.latent, c.out);
  }
}

void mix_chunk_i8(const Attend& c, const Work& w, const Chunk& chunk, Ahead& ahead) {
  const CacheShape& s = c.shape;
  const int dim = s.v_dim ? s.v_dim : s.latent;
  const uint8_t* values[kChunk / kLanes];
  alignas(64) float scales[kChunk];
  const int blocks = chunk.blocks(), num = blocks * kLanes;
  float fault = 0.0f;
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* block = block_at(c, chunk.begin + b * kLanes);
    values[b] = block + s.value_offset();
    if (s.v_dim == 0) {
      uint8_t* turned = w.turned + int64_t{b} * kLanes * dim;
      turn_latent(block, dim, turned);
      values[b] = turned;
    }
    const F v = f_load(reinterpret_cast<const float*>(block + s.scale_offset()) + (s.v_dim ? kLanes : 0));
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
    for (; r + 4 <= c.num_rows; r += 4) mix_rows_i8<4>(values, ahead, blocks, dim, r, w.digits, c.out);
  }
  for (; r + 2 <= c.num_rows; r += 2) mix_rows_i8<2>(values, ahead, blocks, dim, r, w.digits, c.out);
  if (r < c.num_rows) mix_rows_i8<1>(values, ahead, blocks, dim, r, w.digits, c.out);
}

bool is_seen_by_all(const Attend& c, int64_t begin, int64_t end) {
  for (int r = 0; r < c.num_rows; ++r) {
    if (c.limits[r] < end || (c.window && c.limits[r] - c.window > begin)) return false;
  }
  return true;
}

// A block that some rows see a part of, row by row: 0 times a NaN that a row must not see would be NaN.
void mix_each(const Attend& c, int64_t token, int n, const uint8_t* values, Ahead& ahead, const float* weights) {
  const CacheShape& s = c.shape;
  for (int r = 0; r < c.num_rows; ++r) {
    const int64_t low = c.window ? c.limits[r] - c.window - token : 0, high = c.limits[r] - token;
    const int first = static_cast<int>(low > 0 ? low : 0), last = static_cast<int>(high < n ? high : n);
    if (first >= last) continue;
    const uint8_t* from = values + first * s.v_dim * s.item();
    mix_all(s.type, from, ahead, s.v_dim, 1, weights + r * kChunk + first, last - first, c.out + r * s.v_dim);
  }
}

void mix_chunk(const Attend& c, const Work& w, const Chunk& chunk, Ahead& ahead) {
  const CacheShape& s = c.shape;
  if (s.type == CacheType::i8) return mix_chunk_i8(c, w, chunk, ahead);
  if (s.v_dim == 0) return mix_latent(c, w, chunk);
  for (int b = 0; b < chunk.blocks(); ++b) {
    const int64_t token = chunk.begin + b * kLanes;
    const int n = static_cast<int>(chunk.end - token < kLanes ? chunk.end - token : kLanes);
    const float* weights = w.scores + b * kLanes;
    const uint8_t* values = block_at(c, token) + s.value_offset();
    if (!is_seen_by_all(c, token, token + n)) {
      mix_each(c, token, n, values, ahead, weights);
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
    Ahead ahead(c, chunk.begin);
    for (int b = 0; b < chunk.blocks(); ++b) {
      const int64_t token = chunk.begin + b * kLanes;
      if (b % 2 == 0 && b + 1 < chunk.blocks() &&
          score_pair(c, q, token, ahead, w.scores + b * kLanes)) {
        ++b;
        continue;
      }
      score_block(c, q, block_at(c, token), ahead, w.scores + b * kLanes);
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
    mix_chunk(c, w, chunk, ahead);
  }
  for (int r = 0; r < c.num_rows; ++r) {
    // A range that a row sees nothing of (top still kNothing) contributes zeros, whatever phi.
    const bool is_out = top[r] > c.phi + c.margin || top[r] < c.phi - c.margin;
    if (is_unified && is_out && top[r] != kNothing) c.flag[r] = 1;
  }
}

}  // namespace mxn::MXN_NS
