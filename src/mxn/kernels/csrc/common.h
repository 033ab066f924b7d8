// What all native kernels share: packed weights, quantized rows, cache blocks. No instruction set, no
// Python. Shape letters: M rows, N output features, K input features, G groups of K.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mxn {

constexpr int kLanes = 16;  // output features side by side in a block of weights, tokens in one of keys

enum class Format : int { f32 = 0, bf16 = 1, u8 = 2, u4 = 3, u6 = 4 };

// A matrix [N, K] in blocks of 16 output features, so that a product needs no shuffles.
//   f32, bf16: [N/16][K][16]
//   u8:        [N/16][K/4][16][4]; a value v means scale * (v - 128), or scale * v - min
//   u4:        [N/16][K/8][16][4]; low nibbles hold k = 0..3 of 8, high ones 4..7; v - 8, or - min
//   u6:        [N/16][K/16][3][16][4]; the low six bits of line i hold k = 4 i .. 4 i + 3 of 16, the upper two
//              bits 2 i and 2 i + 1 of k = 12 .. 15; v - 32, or - min
// N is padded to 16 and K to `group` (and to 16); the padding of K meets activations that are 0.
struct Weight {
  Format format = Format::f32;
  int64_t n = 0, k = 0, k_padded = 0;
  int64_t group = 0;               // columns that share a scale; k_padded: one scale for each feature
  const uint8_t* data = nullptr;
  const uint16_t* scales = nullptr;  // fp16 [N/16][G][16]
  const uint16_t* mins = nullptr;    // fp16 [N/16][G][16], or null: symmetric
  const float* bias = nullptr;       // [N padded], or null
  float gain = 1.0f;                 // multiplies every scale and min
  int64_t tiled_from = INT64_MAX;    // rows from which on `Rows::tiled` pays, where measured

  int64_t num_blocks() const { return (n + kLanes - 1) / kLanes; }
  int64_t num_groups() const { return group ? k_padded / group : 0; }
  int bits() const {
    switch (format) {
      case Format::f32: return 32;
      case Format::bf16: return 16;
      case Format::u8: return 8;
      case Format::u6: return 6;
      case Format::u4: break;
    }
    return 4;
  }
  int64_t block_bytes() const { return k_padded * kLanes * bits() / 8; }
  int middle() const { return 1 << (bits() - 1); }  // what stands for 0 where there is no minimum
  bool is_quantized() const { return bits() <= 8; }
  // Whether rows made ready for `other` are what this weight multiplies.
  bool reads_rows_of(const Weight& other) const {
    if (is_quantized() != other.is_quantized() || k != other.k) return false;
    return !is_quantized() || (group == other.group && k_padded == other.k_padded);
  }
};

// Rows of activations. Plain formats read `x`; quantized ones int8 values with a scale a group.
struct Rows {
  const float* x = nullptr;  // [M, ld]
  int64_t ld = 0;
  const int8_t* q = nullptr;      // [M, k_padded]
  const float* scales = nullptr;  // [M, G]
  const float* sums = nullptr;    // [M, G] scale * sum of the group's values
  const int32_t* isums = nullptr; // [M, G] sum of the group's values
  const int8_t* tiled = nullptr;  // q once more, tile by tile as [k / 4][rows of the tile][4], or null
  int64_t group = 0, num_groups = 0, k_padded = 0;
};

enum class Act : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };
enum class CacheType : int { f32 = 0, bf16 = 1, i8 = 2 };

// Keys and values of 16 tokens for one key/value head are a block; a cache is [heads][pages][blocks of
// a page], so that a head's context is one stream where its pages are neighbours.
//   i8:        keys [H/4][16][4] as value + 128, values [16/4][J][4], scales of keys [16], of values [16]
//   f32, bf16: keys [H][16], values [16][J]
// J == 0: the values are the first `latent` dims of the keys (MLA).
struct CacheShape {
  CacheType type = CacheType::f32;
  int heads = 1, k_dim = 0, v_dim = 0, latent = 0, page_tokens = 16;
  int64_t num_pages = 0;

  int64_t item() const { return type == CacheType::f32 ? 4 : type == CacheType::bf16 ? 2 : 1; }
  int64_t value_offset() const { return int64_t{kLanes} * k_dim * item(); }
  int64_t scale_offset() const { return value_offset() + int64_t{kLanes} * v_dim * item(); }
  int64_t block_bytes() const {
    return scale_offset() + (type == CacheType::i8 ? 4 * kLanes * (v_dim ? 2 : 1) : 0);
  }
  int64_t block_start(int64_t page, int64_t token_in_page, int head) const {
    const int64_t parts = page_tokens / kLanes;
    return ((head * num_pages + page) * parts + token_in_page / kLanes) * block_bytes();
  }
  int64_t page_bytes() const { return block_bytes() * heads * (page_tokens / kLanes); }
};

// What one call of `attend` computes: some query rows against a range of one head's cache.
struct Attend {
  CacheShape shape;
  const uint8_t* cache = nullptr;  // of this layer
  const int64_t* pages = nullptr;  // of this sequence
  int head = 0;                    // key/value head
  int num_rows = 0;                // query rows
  const float* q = nullptr;        // [num_rows, k_dim], contiguous
  const int64_t* limits = nullptr; // [num_rows] tokens a row sees, from the first
  int64_t begin = 0, end = 0;      // tokens; begin is a multiple of 16
  int64_t window = 0;              // tokens a row sees at most; 0: all
  float scale = 1.0f, softcap = 0.0f;
  float phi = 0.0f, margin = 0.0f; // unified maximum; margin 0: the running maximum instead
  float* out = nullptr;            // [num_rows, J] sum of exp(x - ref) * v
  float* den = nullptr;            // [num_rows] sum of exp(x - ref)
  float* ref = nullptr;            // [num_rows] what was subtracted
  uint8_t* flag = nullptr;         // [num_rows] set when a row left phi +- margin
  float* scratch = nullptr;        // attend_scratch() floats
  // Fetched into the cache beside the last work: the keys and values that the same thread reads next.
  bool is_first = true;            // no call fetched for this one
  const int64_t* next_pages = nullptr;
  int next_head = 0;
  int64_t next_begin = 0, next_end = 0;  // tokens; equal: nothing
};

constexpr int kMaxQueryRows = 16;
constexpr int kChunk = 64;  // tokens of a step of attention

struct ChoiceRule;  // sample.h

// One variant's kernels. All pointers are set; nothing here allocates or throws.
struct Kernels {
  const char* name;
  int tile_rows;  // rows that share one pass over the weights
  // Writes `tiled` of rows [m0, m1), which must be the rows of one later call of gemm.
  void (*tile_rows_of)(const Rows&, int64_t m0, int64_t m1, int8_t* tiled);
  // y[m, n] for rows [m0, m1) and blocks [b0, b1); is_added: y += instead of y =.
  void (*gemm)(const Weight&, const Rows&, int64_t m0, int64_t m1, int64_t b0, int64_t b1, float* y,
               int64_t ldy, bool is_added);
  // act(gate) * up for pairs of blocks [p0, p1): block 2p holds gates, 2p + 1 the ups. y [M, ldy]
  // has ldy columns.
  void (*gemm_glu)(const Weight&, const Rows&, int64_t m0, int64_t m1, int64_t p0, int64_t p1,
                   float* y, int64_t ldy, Act act);
  void (*rms_norm)(const float* x, const float* w, float* y, int64_t n, float eps);
  void (*quantize)(const float* x, int64_t k, int64_t k_padded, int64_t group, int8_t* q,
                   float* scales, float* sums, int32_t* isums);
  void (*activate)(const float* x, float* y, int64_t n, Act act);
  void (*add)(const float* x, float scale, float* y, int64_t n);  // y += scale * x
  void (*rope)(float* x, const float* cos, const float* sin, int half, bool is_interleaved);
  void (*cache_write)(const CacheShape&, uint8_t* cache, const int64_t* pages, int64_t position,
                      int head, const float* k, const float* v);
  void (*attend)(const Attend&);
  void (*softcap)(float* x, int64_t n, float cap);
  int64_t (*argmax)(const float* x, int64_t n);  // -1: not finite, or a NaN among them
  void (*pack_block)(const float* const* rows, int64_t k, int64_t k_padded, int64_t group, int bits,
                     uint8_t* data, float* scales, float* mins);
  int64_t (*choose)(const float* x, int64_t n, const ChoiceRule&, float* scratch);  // -1: like argmax
};

// Floats for the scores and weights of a chunk, its values in another layout, and the queries as int8.
inline int64_t attend_scratch(int k_dim, int v_dim) {
  return kMaxQueryRows * kChunk * 3 / 2 + 2 * kLanes * (int64_t{v_dim} + kLanes) + kMaxQueryRows * int64_t{k_dim} / 4 + 256;
}

}  // namespace mxn
