// A whole decoder on packed weights: one call for a step of any number of sequences.
//
// Knows layers, rows and cache pages; knows no requests and no Python. Memory of weights and cache
// belongs to the caller. Start at `Decoder::forward`.
#pragma once
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "common.h"
#include "pool.h"
#include "variants.h"

namespace mxn {

struct Rope {
  const float* cos = nullptr;  // [max positions, half]
  const float* sin = nullptr;
  int half = 0;
  bool is_interleaved = false;
};

struct Attention {
  int heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f, softcap = 0.0f, eps = 1e-6f;
  int64_t window = 0;
  int qk_norm = 0;  // 0 none, 1 each head, 2 all heads together
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  int rope = -1;  // index, or none
  float phi = 0.0f, margin = 0.0f;
  Weight qkv, out;
  // Latent attention: the cache holds [latent, rotated part], one for all heads.
  bool is_mla = false, has_q_lora = false;
  int nope_dim = 0, rope_dim = 0, v_dim = 0, latent = 0, q_rank = 0;
  float latent_eps = 1e-6f;
  Weight q, q_a, q_b, kv_a;
  const float* q_a_norm = nullptr;
  const float* kv_a_norm = nullptr;
  std::vector<Weight> key_up, value_up;  // for each head
};

struct Mlp {
  int64_t intermediate = 0;
  Act act = Act::silu;
  bool is_gated = true;  // then blocks of 16 gates and 16 ups take turns
  Weight up, down;
};

struct Moe {
  int num_experts = 0, top_k = 0, num_groups = 1, top_groups = 1;
  bool is_sigmoid = false, is_normalized = false, is_top2_sum = false;
  float scale = 1.0f;
  Weight router;
  const float* bias = nullptr;
  std::vector<Mlp> experts;
  bool has_shared = false, has_shared_gate = false;
  Mlp shared;
  Weight shared_gate;
};

struct Layer {
  const float* pre_attn = nullptr;
  const float* post_attn = nullptr;
  const float* pre_ffn = nullptr;
  const float* post_ffn = nullptr;
  float residual_scale = 1.0f;
  Attention attention;
  bool is_moe = false;
  Mlp mlp;
  Moe moe;
  CacheShape cache;
};

struct Step {
  int64_t num_tokens = 0, num_sequences = 0, num_rows = 0, table_width = 0;
  const int64_t* tokens = nullptr;        // [T]
  const int64_t* positions = nullptr;     // [T]
  const int64_t* query_starts = nullptr;  // [S + 1]
  const int64_t* context_lens = nullptr;  // [S]
  const int64_t* pages = nullptr;         // [S, table_width]
  const int64_t* rows = nullptr;          // [R] tokens whose logits are wanted
  uint8_t* const* caches = nullptr;       // [layers]
  float* logits = nullptr;                // [R, V]
  const float* hidden_in = nullptr;       // [T, D] what a prediction layer gets of each token
  float* hidden_out = nullptr;            // [T, D] behind the final norm (of a prediction layer: before), or null
};

// Memory that only grows, so that steps of a size seen before allocate nothing.
template <typename T>
class Buffer {
 public:
  T* at_least(int64_t n) {
    if (n > size_) {
      memory_.reset(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), std::align_val_t{64})));
      size_ = n;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

// Rows made ready for one product, with the memory they need.
class Packed {
 public:
  // Norms (when `norm` is given) and quantizes rows as `w` wants them. x [M, ld].
  const Rows& make(Pool& pool, const Weight& w, const float* x, int64_t ld, int64_t m, const float* norm,
                   float eps, int64_t act_group);
  // Room for `m` rows of what `w` reads; fill it with `put`.
  const Rows& reserve(const Weight& w, int64_t m, int64_t act_group);
  void put(int64_t row, const float* x);
  void copy(int64_t row, const Packed& from, int64_t from_row);
  const Rows& rows() const { return rows_; }

 private:
  Rows rows_;
  int64_t k_ = 0;
  bool is_quantized_ = false;
  Buffer<float> x_, scales_, sums_;
  Buffer<int32_t> isums_;
  Buffer<int8_t> q_;
};

// y = rows * w^T (+ y) over all threads.
void multiply(Pool& pool, const Weight& w, const Rows& rows, int64_t m, float* y, int64_t ldy, bool is_added);
void multiply_glu(Pool& pool, const Weight& w, const Rows& rows, int64_t m, float* y, int64_t ldy, Act act);

struct Experts;  // scratch of the mixture layers, in moe.cpp

class Decoder {
 public:
  Decoder();
  ~Decoder();

  // Filled by the caller before the first step.
  int64_t hidden = 0, vocab = 0;
  float eps = 1e-6f, embedding_scale = 1.0f, logit_scale = 1.0f, logit_softcap = 0.0f;
  int64_t act_group = 0;  // of products with one scale for each feature; 0: one for each token
  Weight embedding;       // plain [V, D] rows as f32 or bf16 (`is_table`), or a packed weight
  bool is_table = true;
  const float* final_norm = nullptr;
  Weight head;
  std::vector<Rope> ropes;
  std::vector<Layer> layers;
  // Of a prediction layer: its rows are merge [norm(embedding), norm(hidden_in)].
  bool is_prediction = false;
  const float* token_norm = nullptr;
  const float* hidden_norm = nullptr;
  Weight merge;  // [D, 2 D]

  void forward(Pool& pool, const Step& step);
  int64_t num_recomputed() const { return num_recomputed_; }  // rows whose maximum left the margin

  // From now on, note the least and the largest maximum of a row of scores, layer by layer.
  void begin_calibration() { ranges_.assign(layers.size(), Range{}); }
  struct Range {
    float low = INFINITY, high = -INFINITY;
    int64_t rows = 0;
  };
  const std::vector<Range>& ranges() const { return ranges_; }
  void end_calibration() { ranges_.clear(); }

 private:
  void embed(const Step& step, float* x) const;
  void merge_hidden(Pool& pool, const Step& step, float* x);
  void attend_layer(Pool& pool, const Step& step, const Layer& layer, uint8_t* cache, float* x);
  void latent_layer(Pool& pool, const Step& step, const Layer& layer, uint8_t* cache, float* x);
  void attend_all(Pool& pool, const Step& step, const Layer& layer, const uint8_t* cache, const float* q,
                  int64_t q_ld, float* out, int64_t out_ld);
  void note_range(const Layer& layer, const float* tops, int num);
  void feed_forward(Pool& pool, const Layer& layer, int64_t m, float* x);
  void mlp(Pool& pool, const Mlp& mlp, const Rows& rows, int64_t m, float* y, bool is_added);
  void mixture(Pool& pool, const Layer& layer, int64_t m, const float* x, float* y);
  void project(Pool& pool, const Layer& layer, const Weight& w, const Rows& rows, int64_t m, const float* norm,
               float* x);
  void add_branch(Pool& pool, const Layer& layer, const float* norm, int64_t m, float* branch, float* x);
  void logits(Pool& pool, const Step& step, const float* x);

  Packed packed_, inner_;
  Buffer<float> x_, wide_, mixed_, branch_, latent_, query_, gate_;
  Buffer<float> scratch_, partial_;
  Buffer<uint8_t> flags_;
  std::unique_ptr<Experts> experts_;
  int64_t num_recomputed_ = 0;
  std::vector<Range> ranges_;  // empty but during a calibration
  std::mutex ranges_lock_;
};

}  // namespace mxn
