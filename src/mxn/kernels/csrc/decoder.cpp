#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "moe.h"

namespace mxn {
namespace {

constexpr int64_t kSerialRows = 4;
constexpr int64_t kItemsPerThread = 8;
constexpr int64_t kLongRange = 512;  // tokens of a range when one context is split over threads

template <typename Fn>
void each_row(Pool& pool, int64_t m, const Fn& fn) {
  if (m < kSerialRows) {
    for (int64_t row = 0; row < m; ++row) fn(row, 0);
  } else {
    pool.run(m, fn);
  }
}

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float half_to_float(uint16_t h) {
  const uint32_t exponent = (h >> 10) & 31, part = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(part), -24);
  if (exponent == 31) return part ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(part + 1024), static_cast<int>(exponent) - 25);
}

int packed_value(const Weight& w, const uint8_t* data, int64_t k, int64_t lane) {
  if (w.format == Format::u8) return data[(k / 4 * kLanes + lane) * 4 + k % 4];
  if (w.format == Format::u4) {
    const uint8_t byte = data[(k / 8 * kLanes + lane) * 4 + k % 4];
    return k % 8 < 4 ? byte & 15 : byte >> 4;
  }
  const uint8_t* lines = data + k / 16 * 192 + lane * 4 + k % 4;
  const int64_t quad = k % 16 / 4;
  if (quad < 3) return lines[64 * quad] & 63;
  return lines[0] >> 6 | lines[64] >> 6 << 2 | lines[128] >> 6 << 4;
}

// One row of a packed matrix as float: what a tied head gives the embedding.
void unpack_row(const Weight& w, int64_t row, float* out) {
  const int64_t block = row / kLanes, lane = row % kLanes, groups = w.num_groups();
  const uint8_t* data = w.data + block * w.block_bytes();
  for (int64_t k = 0; k < w.k; ++k) {
    if (w.format == Format::f32) {
      out[k] = reinterpret_cast<const float*>(data)[k * kLanes + lane];
      continue;
    }
    if (w.format == Format::bf16) {
      out[k] = bf16_to_float(reinterpret_cast<const uint16_t*>(data)[k * kLanes + lane]);
      continue;
    }
    const int value = packed_value(w, data, k, lane);
    const int64_t at = (block * groups + k / w.group) * kLanes + lane;
    const float scale = half_to_float(w.scales[at]);
    const float v = w.mins ? scale * static_cast<float>(value) - half_to_float(w.mins[at])
                           : scale * static_cast<float>(value - w.middle());
    out[k] = v * w.gain;
  }
}

// A range of one sequence's context for some query rows of one key/value head.
struct Task {
  int64_t sequence, head, first_token, num_tokens, first_query_head, num_heads;
  int64_t begin, end;
  int64_t partial;  // index of its partial result, -1: it is the only range of its rows
};

}  // namespace

Decoder::Decoder() : experts_(std::make_unique<Experts>()) {}
Decoder::~Decoder() = default;

void Decoder::embed(const Step& step, float* x) const {
  for (int64_t t = 0; t < step.num_tokens; ++t) {
    float* row = x + t * hidden;
    const int64_t token = step.tokens[t];
    if (!is_table) {
      unpack_row(embedding, token, row);
    } else if (embedding.format == Format::f32) {
      std::memcpy(row, reinterpret_cast<const float*>(embedding.data) + token * hidden,
                  static_cast<size_t>(hidden) * sizeof(float));
    } else {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(embedding.data) + token * hidden;
      for (int64_t i = 0; i < hidden; ++i) row[i] = bf16_to_float(from[i]);
    }
    if (embedding_scale != 1.0f) {
      for (int64_t i = 0; i < hidden; ++i) row[i] *= embedding_scale;
    }
  }
}

// Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
void Decoder::merge_hidden(Pool& pool, const Step& step, float* x) {
  const Kernels& k = kernels();
  const int64_t m = step.num_tokens;
  float* both = wide_.at_least(m * 2 * hidden);
  each_row(pool, m, [&](int64_t t, int) {
    float* row = both + t * 2 * hidden;
    k.rms_norm(x + t * hidden, token_norm, row, hidden, eps);
    k.rms_norm(step.hidden_in + t * hidden, hidden_norm, row + hidden, hidden, eps);
  });
  const Rows& rows = packed_.make(pool, merge, both, 2 * hidden, m, nullptr, eps, act_group);
  multiply(pool, merge, rows, m, x, hidden, false);
}

void Decoder::forward(Pool& pool, const Step& step) {
  float* x = x_.at_least(step.num_tokens * hidden);
  embed(step, x);
  if (is_prediction) merge_hidden(pool, step, x);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    if (layer.attention.is_mla) latent_layer(pool, step, layer, step.caches[i], x);
    else attend_layer(pool, step, layer, step.caches[i], x);
    feed_forward(pool, layer, step.num_tokens, x);
  }
  if (step.hidden_out && is_prediction) {
    std::copy_n(x, step.num_tokens * hidden, step.hidden_out);
  } else if (step.hidden_out) {
    const auto norm = kernels().rms_norm;
    each_row(pool, step.num_tokens,
             [&](int64_t t, int) { norm(x + t * hidden, final_norm, step.hidden_out + t * hidden, hidden, eps); });
  }
  logits(pool, step, x);
}

void Decoder::logits(Pool& pool, const Step& step, const float* x) {
  if (step.num_rows == 0) return;
  float* picked = branch_.at_least(step.num_rows * hidden);
  for (int64_t r = 0; r < step.num_rows; ++r) {
    std::memcpy(picked + r * hidden, x + step.rows[r] * hidden, static_cast<size_t>(hidden) * sizeof(float));
  }
  const Rows& rows = packed_.make(pool, head, picked, hidden, step.num_rows, final_norm, eps, act_group);
  multiply(pool, head, rows, step.num_rows, step.logits, vocab, false);
  if (logit_scale == 1.0f && logit_softcap == 0.0f) return;
  const auto softcap = kernels().softcap;
  each_row(pool, step.num_rows, [&](int64_t r, int) {
    float* row = step.logits + r * vocab;
    if (logit_scale != 1.0f) {
      for (int64_t i = 0; i < vocab; ++i) row[i] *= logit_scale;
    }
    if (logit_softcap != 0.0f) softcap(row, vocab, logit_softcap);
  });
}

// x += scale * norm(w * rows); directly when nothing stands between.
void Decoder::project(Pool& pool, const Layer& layer, const Weight& w, const Rows& rows, int64_t m,
                      const float* norm, float* x) {
  if (!norm && layer.residual_scale == 1.0f) {
    multiply(pool, w, rows, m, x, hidden, true);
    return;
  }
  float* branch = branch_.at_least(m * hidden);
  multiply(pool, w, rows, m, branch, hidden, false);
  add_branch(pool, layer, norm, m, branch, x);
}

void Decoder::add_branch(Pool& pool, const Layer& layer, const float* norm, int64_t m, float* branch, float* x) {
  const Kernels& k = kernels();
  each_row(pool, m, [&](int64_t row, int) {
    float* from = branch + row * hidden;
    if (norm) k.rms_norm(from, norm, from, hidden, eps);
    k.add(from, layer.residual_scale, x + row * hidden, hidden);
  });
}

void Decoder::attend_layer(Pool& pool, const Step& step, const Layer& layer, uint8_t* cache, float* x) {
  const Attention& a = layer.attention;
  const Kernels& k = kernels();
  const int64_t m = step.num_tokens, dim = a.head_dim, q_width = a.heads * dim, kv_width = a.kv_heads * dim;
  const int64_t width = q_width + 2 * kv_width;
  const Rows& rows = packed_.make(pool, a.qkv, x, hidden, m, layer.pre_attn, eps, act_group);
  float* qkv = wide_.at_least(m * width);
  multiply(pool, a.qkv, rows, m, qkv, width, false);
  const Rope* rope = a.rope < 0 ? nullptr : &ropes[static_cast<size_t>(a.rope)];
  // Rows of a step come sequence by sequence; which one a row belongs to is found by bisection.
  each_row(pool, m, [&](int64_t t, int) {
    float* q = qkv + t * width;
    float* key = q + q_width;
    const int64_t position = step.positions[t];
    const int64_t s = std::upper_bound(step.query_starts, step.query_starts + step.num_sequences + 1, t) -
                      step.query_starts - 1;
    if (a.qk_norm == 2) {
      k.rms_norm(q, a.q_norm, q, q_width, eps);
      k.rms_norm(key, a.k_norm, key, kv_width, eps);
    }
    for (int h = 0; h < a.heads + a.kv_heads; ++h) {
      float* head = q + h * dim;
      if (a.qk_norm == 1) k.rms_norm(head, h < a.heads ? a.q_norm : a.k_norm, head, dim, eps);
      if (rope) {
        k.rope(head, rope->cos + position * rope->half, rope->sin + position * rope->half, rope->half,
               rope->is_interleaved);
      }
    }
    for (int g = 0; g < a.kv_heads; ++g) {
      k.cache_write(layer.cache, cache, step.pages + s * step.table_width, position, g, key + g * dim,
                    key + kv_width + g * dim);
    }
  });
  float* mixed = mixed_.at_least(m * q_width);
  attend_all(pool, step, layer, cache, qkv, width, mixed, q_width);
  const Rows& out = packed_.make(pool, a.out, mixed, q_width, m, nullptr, eps, act_group);
  project(pool, layer, a.out, out, m, layer.post_attn, x);
}

void Decoder::latent_layer(Pool& pool, const Step& step, const Layer& layer, uint8_t* cache, float* x) {
  const Attention& a = layer.attention;
  const Kernels& k = kernels();
  const int64_t m = step.num_tokens, q_head = a.nope_dim + a.rope_dim, q_width = a.heads * q_head;
  const int64_t key_dim = a.latent + a.rope_dim, kv_width = a.latent + a.rope_dim;
  const Weight& first = a.has_q_lora ? a.q_a : a.q;
  const Rows* rows = &packed_.make(pool, a.kv_a, x, hidden, m, layer.pre_attn, eps, act_group);
  float* q = wide_.at_least(m * (q_width + kv_width));
  float* kv = q + m * q_width;
  multiply(pool, a.kv_a, *rows, m, kv, kv_width, false);
  // Both products read the same rows, unless a checkpoint brings them in two groupings.
  if (!a.kv_a.reads_rows_of(first)) {
    rows = &packed_.make(pool, first, x, hidden, m, layer.pre_attn, eps, act_group);
  }
  if (a.has_q_lora) {
    float* rank = branch_.at_least(m * a.q_rank);
    multiply(pool, a.q_a, *rows, m, rank, a.q_rank, false);
    rows = &packed_.make(pool, a.q_b, rank, a.q_rank, m, a.q_a_norm, a.latent_eps, act_group);
    multiply(pool, a.q_b, *rows, m, q, q_width, false);
  } else {
    multiply(pool, a.q, *rows, m, q, q_width, false);
  }
  const Rope* rope = a.rope < 0 ? nullptr : &ropes[static_cast<size_t>(a.rope)];
  float* query = query_.at_least(m * a.heads * key_dim);
  each_row(pool, m, [&](int64_t t, int) {
    float* latent = kv + t * kv_width;
    const int64_t position = step.positions[t];
    const int64_t s = std::upper_bound(step.query_starts, step.query_starts + step.num_sequences + 1, t) -
                      step.query_starts - 1;
    k.rms_norm(latent, a.kv_a_norm, latent, a.latent, a.latent_eps);
    const float *cos = rope ? rope->cos + position * rope->half : nullptr,
                *sin = rope ? rope->sin + position * rope->half : nullptr;
    if (rope) k.rope(latent + a.latent, cos, sin, rope->half, rope->is_interleaved);
    k.cache_write(layer.cache, cache, step.pages + s * step.table_width, position, 0, latent, nullptr);
    for (int h = 0; h < a.heads; ++h) {
      float* part = q + t * q_width + h * q_head + a.nope_dim;
      if (rope) k.rope(part, cos, sin, rope->half, rope->is_interleaved);
      std::memcpy(query + (t * a.heads + h) * key_dim + a.latent, part,
                  static_cast<size_t>(a.rope_dim) * sizeof(float));
    }
  });
  // Queries go to the latent space, head by head.
  pool.run(a.heads, [&](int64_t h, int) {
    const Weight& w = a.key_up[static_cast<size_t>(h)];
    Rows nope;
    nope.x = q + h * q_head, nope.ld = q_width, nope.k_padded = w.k_padded;
    k.gemm(w, nope, 0, m, 0, w.num_blocks(), query + h * key_dim, a.heads * key_dim, false);
  });
  float* mixed = mixed_.at_least(m * a.heads * (a.latent + a.v_dim));
  float* values = mixed + m * a.heads * a.latent;
  attend_all(pool, step, layer, cache, query, a.heads * key_dim, mixed, a.heads * a.latent);
  pool.run(a.heads, [&](int64_t h, int) {
    const Weight& w = a.value_up[static_cast<size_t>(h)];
    Rows from;
    from.x = mixed + h * a.latent, from.ld = a.heads * a.latent, from.k_padded = w.k_padded;
    k.gemm(w, from, 0, m, 0, w.num_blocks(), values + h * a.v_dim, a.heads * a.v_dim, false);
  });
  const Rows& out = packed_.make(pool, a.out, values, a.heads * a.v_dim, m, nullptr, eps, act_group);
  project(pool, layer, a.out, out, m, layer.post_attn, x);
}

void Decoder::attend_all(Pool& pool, const Step& step, const Layer& layer, const uint8_t* cache, const float* q,
                         int64_t q_ld, float* out, int64_t out_ld) {
  const Attention& a = layer.attention;
  const Kernels& k = kernels();
  const CacheShape& shape = layer.cache;
  const int64_t dim = shape.k_dim, out_dim = shape.v_dim ? shape.v_dim : shape.latent;
  const int64_t shared = a.heads / shape.heads;  // query heads of a key/value head
  const int64_t at_once = std::min<int64_t>(shared, kMaxQueryRows);
  const int64_t tokens_at_once = std::max<int64_t>(1, kMaxQueryRows / at_once);
  std::vector<Task> tasks;
  int64_t num_partials = 0;
  for (int64_t s = 0; s < step.num_sequences; ++s) {
    const int64_t first = step.query_starts[s], last = step.query_starts[s + 1];
    // The longest ranges first: they would otherwise be the tail everybody waits for.
    for (int64_t end = last; end > first; end -= std::min(tokens_at_once, end - first)) {
      const int64_t begin = std::max(first, end - tokens_at_once);
      const int64_t limit = step.positions[end - 1] + 1;
      int64_t low = a.window ? std::max<int64_t>(0, step.positions[begin] + 1 - a.window) : 0;
      low -= low % kLanes;
      const int64_t others = shape.heads * step.num_sequences;
      const bool is_split = last - first == 1 && others < 4 * pool.num_threads() && limit - low > 2 * kLongRange;
      const int64_t parts = is_split ? std::min<int64_t>((limit - low) / kLongRange, 4 * pool.num_threads()) : 1;
      for (int64_t g = 0; g < shape.heads; ++g) {
        for (int64_t h = 0; h < shared; h += at_once) {
          for (int64_t p = 0; p < parts; ++p) {
            auto cut = [&](int64_t i) { return i == parts ? limit : low + (limit - low) * i / parts / kLanes * kLanes; };
            tasks.push_back({s, g, begin, end - begin, g * shared + h, std::min(at_once, shared - h), cut(p),
                             cut(p + 1), parts == 1 ? -1 : num_partials++});
          }
        }
      }
    }
  }
  const int64_t partial_size = kMaxQueryRows * (out_dim + 2);
  float* partial = partial_.at_least(std::max<int64_t>(1, num_partials * partial_size));
  const int64_t queries = kMaxQueryRows * (dim + out_dim + 4);
  const int64_t scratch_size = attend_scratch(static_cast<int>(dim), static_cast<int>(out_dim)) + queries;
  float* scratch = scratch_.at_least(pool.num_threads() * scratch_size);
  std::atomic<int64_t> recomputed{0};
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  auto compute = [&](int64_t index, int64_t first, int64_t last, int thread) {
    const Task& task = tasks[static_cast<size_t>(index)];
    float* mine = scratch + thread * scratch_size;
    float* rows = mine;
    float* sums = rows + kMaxQueryRows * dim;
    float* den = sums + kMaxQueryRows * out_dim;
    float* ref = den + kMaxQueryRows;
    int64_t limits[kMaxQueryRows];
    uint8_t flags[kMaxQueryRows];
    int num = 0;
    for (int64_t t = task.first_token; t < task.first_token + task.num_tokens; ++t) {
      for (int64_t h = 0; h < task.num_heads; ++h, ++num) {
        std::memcpy(rows + num * dim, q + t * q_ld + (task.first_query_head + h) * dim,
                    static_cast<size_t>(dim) * sizeof(float));
        limits[num] = step.positions[t] + 1;
      }
    }
    if (task.partial >= 0) {
      sums = partial + task.partial * partial_size;
      den = sums + num * out_dim;
      ref = den + num;
    }
    Attend call;
    call.shape = shape, call.cache = cache, call.pages = step.pages + task.sequence * step.table_width;
    call.head = static_cast<int>(task.head), call.num_rows = num, call.q = rows, call.limits = limits;
    call.begin = task.begin, call.end = task.end, call.window = a.window;
    call.scale = a.scale, call.softcap = a.softcap, call.phi = a.phi, call.margin = a.margin;
    call.out = sums, call.den = den, call.ref = ref, call.flag = flags, call.scratch = mine + queries;
    call.is_first = index == first;
    if (index + 1 < last) {
      const Task& next = tasks[static_cast<size_t>(index + 1)];
      call.next_pages = step.pages + next.sequence * step.table_width;
      call.next_head = static_cast<int>(next.head), call.next_begin = next.begin, call.next_end = next.end;
    }
    k.attend(call);
    if (a.margin > 0.0f && std::any_of(flags, flags + num, [](uint8_t f) { return f != 0; })) {
      recomputed.fetch_add(std::count(flags, flags + num, uint8_t{1}), std::memory_order_relaxed);
      call.margin = 0.0f;
      k.attend(call);
    }
    if (task.partial >= 0) return;
    if (!ranges_.empty()) note_range(layer, ref, num);
    for (int r = 0; r < num; ++r) {
      const int64_t t = task.first_token + r / task.num_heads, h = task.first_query_head + r % task.num_heads;
      float* to = out + t * out_ld + h * out_dim;
      const float inverse = 1.0f / den[r];
      for (int64_t j = 0; j < out_dim; ++j) to[j] = sums[r * out_dim + j] * inverse;
    }
  };
  // Neighbours go to one thread, which fetches the keys of the next while it works on one.
  const int64_t items = std::min(num_tasks, kItemsPerThread * pool.num_threads());
  pool.run(items, [&](int64_t item, int thread) {
    const int64_t first = num_tasks * item / items, last = num_tasks * (item + 1) / items;
    for (int64_t i = first; i < last; ++i) compute(i, first, last, thread);
  });
  num_recomputed_ += recomputed.load();
  // Ranges of one row are neighbours in `tasks`. Those that used phi need no rescaling against each other.
  for (size_t i = 0; i < tasks.size();) {
    size_t j = i + 1;
    const Task& task = tasks[i];
    if (task.partial < 0) {
      i = j;
      continue;
    }
    while (j < tasks.size() && tasks[j].partial >= 0 && tasks[j].begin > tasks[j - 1].begin &&
           tasks[j].first_query_head == task.first_query_head && tasks[j].first_token == task.first_token) {
      ++j;
    }
    for (int64_t r = 0; r < task.num_heads; ++r) {
      float* to = out + task.first_token * out_ld + (task.first_query_head + r) * out_dim;
      auto part = [&](size_t p) { return partial + tasks[p].partial * partial_size; };
      auto den_of = [&](size_t p) { return part(p) + task.num_heads * out_dim + r; };
      auto ref_of = [&](size_t p) { return *(den_of(p) + task.num_heads); };
      float top = ref_of(i), den = 0.0f;
      for (size_t p = i + 1; p < j; ++p) top = std::max(top, ref_of(p));
      std::fill(to, to + out_dim, 0.0f);
      for (size_t p = i; p < j; ++p) {
        const float factor = ref_of(p) == top ? 1.0f : std::exp(ref_of(p) - top);
        den += factor * *den_of(p);
        k.add(part(p) + r * out_dim, factor, to, out_dim);
      }
      for (int64_t d = 0; d < out_dim; ++d) to[d] /= den;
    }
    i = j;
  }
}

void Decoder::note_range(const Layer& layer, const float* tops, int num) {
  const std::lock_guard<std::mutex> lock(ranges_lock_);
  Range& range = ranges_[static_cast<size_t>(&layer - layers.data())];
  range.rows += num;
  for (int r = 0; r < num; ++r) {
    range.low = std::min(range.low, tops[r]);
    range.high = std::max(range.high, tops[r]);
  }
}

void Decoder::mlp(Pool& pool, const Mlp& mlp, const Rows& rows, int64_t m, float* y, bool is_added) {
  float* inner = gate_.at_least(m * mlp.intermediate);
  if (mlp.is_gated) {
    multiply_glu(pool, mlp.up, rows, m, inner, mlp.intermediate, mlp.act);
  } else {
    multiply(pool, mlp.up, rows, m, inner, mlp.intermediate, false);
    const auto activate = kernels().activate;
    each_row(pool, m, [&](int64_t row, int) {
      activate(inner + row * mlp.intermediate, inner + row * mlp.intermediate, mlp.intermediate, mlp.act);
    });
  }
  const Rows& packed = inner_.make(pool, mlp.down, inner, mlp.intermediate, m, nullptr, eps, act_group);
  multiply(pool, mlp.down, packed, m, y, hidden, is_added);
}

void Decoder::feed_forward(Pool& pool, const Layer& layer, int64_t m, float* x) {
  const bool is_direct = !layer.post_ffn && layer.residual_scale == 1.0f;
  if (!layer.is_moe) {
    const Rows& rows = packed_.make(pool, layer.mlp.up, x, hidden, m, layer.pre_ffn, eps, act_group);
    float* y = is_direct ? x : branch_.at_least(m * hidden);
    mlp(pool, layer.mlp, rows, m, y, is_direct);
    if (!is_direct) add_branch(pool, layer, layer.post_ffn, m, y, x);
    return;
  }
  float* y = branch_.at_least(m * hidden);
  mixture(pool, layer, m, x, y);
  add_branch(pool, layer, layer.post_ffn, m, y, x);
}

}  // namespace mxn
