// Products of rows with packed weights. A tile is some rows times one block of 16 output features; its
// weights are unpacked once for all rows, and its sums stay in registers over the whole of K.
#include "common.h"
#include "vec.h"

namespace mxn::MXN_NS {
namespace {

using Tile = void (*)(const Weight&, const Rows&, int64_t m, int64_t block, float* y, int64_t ldy);

// One group of K for MR rows: sums += scale * (dot - offset * sum of activations).
template <int MR, bool IS_U4>
inline void dot_group(const uint8_t*& w, const int8_t* const (&a)[MR], int64_t k, int64_t length,
                      I (&sum)[MR]) {
  constexpr int64_t kStep = IS_U4 ? 8 : 4;
  for (int64_t i = k; i < k + length; i += kStep, w += 64) {
    const B packed = b_load(w);
    if constexpr (IS_U4) {
      const B low = b_low(packed), high = b_high(packed);
      for (int m = 0; m < MR; ++m) sum[m] = dot_u4(sum[m], low, four_bytes(a[m] + i));
      for (int m = 0; m < MR; ++m) sum[m] = dot_u4(sum[m], high, four_bytes(a[m] + i + 4));
    } else {
      for (int m = 0; m < MR; ++m) sum[m] = dot_u8(sum[m], packed, four_bytes(a[m] + i));
    }
  }
}

// A few rows leave room for independent sums over K, which hide the latency of the dot product.
template <int MR, bool IS_U4>
inline void dot_group_deep(const uint8_t*& w, const int8_t* const (&a)[MR], int64_t k, int64_t length,
                           I (&sum)[MR]) {
  constexpr int64_t kStep = IS_U4 ? 8 : 4;
  I other[MR];
  for (int m = 0; m < MR; ++m) other[m] = i_zero();
  int64_t i = k;
  for (; i + 2 * kStep <= k + length; i += 2 * kStep, w += 128) {
    const B first = b_load(w), second = b_load(w + 64);
    if constexpr (IS_U4) {
      const B l0 = b_low(first), h0 = b_high(first), l1 = b_low(second), h1 = b_high(second);
      for (int m = 0; m < MR; ++m) {
        sum[m] = dot_u4(sum[m], l0, four_bytes(a[m] + i));
        other[m] = dot_u4(other[m], h0, four_bytes(a[m] + i + 4));
        sum[m] = dot_u4(sum[m], l1, four_bytes(a[m] + i + 8));
        other[m] = dot_u4(other[m], h1, four_bytes(a[m] + i + 12));
      }
    } else {
      for (int m = 0; m < MR; ++m) {
        sum[m] = dot_u8(sum[m], first, four_bytes(a[m] + i));
        other[m] = dot_u8(other[m], second, four_bytes(a[m] + i + 4));
      }
    }
  }
  dot_group<MR, IS_U4>(w, a, i, k + length - i, sum);
  for (int m = 0; m < MR; ++m) sum[m] = i_add(sum[m], other[m]);
}

template <int MR, bool IS_U4, bool HAS_MIN>
void quantized_tile(const Weight& w, const Rows& rows, int64_t m0, int64_t block, float* y, int64_t ldy) {
  // A scale for each feature (group = all of K) is applied once, behind the activations' own groups.
  const bool is_grouped = w.group < w.k_padded;
  const int64_t length = is_grouped ? w.group : rows.group, num_groups = w.k_padded / length;
  const int64_t act_step = rows.num_groups == num_groups ? 1 : 0;
  const uint16_t* scales = w.scales + block * w.num_groups() * kLanes;
  const uint16_t* mins = HAS_MIN ? w.mins + block * w.num_groups() * kLanes : nullptr;
  const uint8_t* data = w.data + block * w.block_bytes();
  const int32_t offset = HAS_MIN ? 0 : IS_U4 ? -8 : -128;
  const int8_t* a[MR];
  F total[MR];
  for (int m = 0; m < MR; ++m) {
    a[m] = rows.q + (m0 + m) * rows.k_padded;
    total[m] = f_zero();
  }
  const F ones = f_set(1.0f);
  for (int64_t g = 0; g < num_groups; ++g) {
    I sum[MR];
    const int64_t at = m0 * rows.num_groups + g * act_step;
    for (int m = 0; m < MR; ++m) {
      sum[m] = HAS_MIN ? i_zero() : i_set(offset * rows.isums[at + m * rows.num_groups]);
    }
    if constexpr (MR <= 4) dot_group_deep<MR, IS_U4>(data, a, g * length, length, sum);
    else dot_group<MR, IS_U4>(data, a, g * length, length, sum);
    const F scale = is_grouped ? f_half(scales + g * kLanes) : ones;
    for (int m = 0; m < MR; ++m) {
      const F factor = f_mul(scale, f_set(rows.scales[at + m * rows.num_groups]));
      total[m] = f_fma(f_int(sum[m]), factor, total[m]);
    }
    if constexpr (HAS_MIN) {
      if (is_grouped) {
        const F low = f_half(mins + g * kLanes);
        for (int m = 0; m < MR; ++m) {
          total[m] = f_fnma(low, f_set(rows.sums[at + m * rows.num_groups]), total[m]);
        }
      }
    }
  }
  if (!is_grouped) {
    const F scale = f_half(scales);
    for (int m = 0; m < MR; ++m) {
      total[m] = f_mul(total[m], scale);
      if constexpr (HAS_MIN) {
        float all = 0.0f;
        for (int64_t g = 0; g < rows.num_groups; ++g) all += rows.sums[(m0 + m) * rows.num_groups + g];
        total[m] = f_fnma(f_half(mins), f_set(all), total[m]);
      }
    }
  }
  const F gain = f_set(w.gain);
  for (int m = 0; m < MR; ++m) f_store(y + m * ldy, f_mul(total[m], gain));
}

template <int MR, bool IS_BF16>
void plain_tile(const Weight& w, const Rows& rows, int64_t m0, int64_t block, float* y, int64_t ldy) {
  const uint8_t* data = w.data + block * w.block_bytes();
  const float* x[MR];
  F even[MR], odd[MR];
  for (int m = 0; m < MR; ++m) {
    x[m] = rows.x + (m0 + m) * rows.ld;
    even[m] = odd[m] = f_zero();
  }
  auto load = [&](int64_t k) {
    return IS_BF16 ? f_bf16(reinterpret_cast<const uint16_t*>(data) + k * kLanes)
                   : f_load(reinterpret_cast<const float*>(data) + k * kLanes);
  };
  int64_t k = 0;
  // The same order of sums for every number of rows: a row must not see how many are beside it.
  for (; k + 2 <= w.k; k += 2) {
    const F first = load(k), second = load(k + 1);
    for (int m = 0; m < MR; ++m) {
      even[m] = f_fma(first, f_set(x[m][k]), even[m]);
      odd[m] = f_fma(second, f_set(x[m][k + 1]), odd[m]);
    }
  }
  for (; k < w.k; ++k) {
    const F v = load(k);
    for (int m = 0; m < MR; ++m) even[m] = f_fma(v, f_set(x[m][k]), even[m]);
  }
  for (int m = 0; m < MR; ++m) f_store(y + m * ldy, f_add(even[m], odd[m]));
}

template <template <int> class Maker, int... MR>
struct Table {
  static constexpr Tile tiles[] = {Maker<MR>::tile...};
};

template <bool IS_U4, bool HAS_MIN>
struct Quantized {
  template <int MR>
  struct Maker { static constexpr Tile tile = quantized_tile<MR, IS_U4, HAS_MIN>; };
};
template <bool IS_BF16>
struct Plain {
  template <int MR>
  struct Maker { static constexpr Tile tile = plain_tile<MR, IS_BF16>; };
};

template <template <int> class Maker>
const Tile* upto(int rows) {
  static_assert(kTileRows <= 8 && kPlainRows <= 12);
  if constexpr (kPlainRows <= 2) return Table<Maker, 1, 2>::tiles;
  else if constexpr (kPlainRows <= 4) return Table<Maker, 1, 2, 3, 4>::tiles;
  else return rows <= 8 ? Table<Maker, 1, 2, 3, 4, 5, 6, 7, 8>::tiles
                        : Table<Maker, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::tiles;
}

struct Choice {
  const Tile* tiles;
  int most;  // rows of the largest tile
};

Choice choose(const Weight& w) {
  switch (w.format) {
    case Format::f32: return {upto<Plain<false>::Maker>(kPlainRows), kPlainRows};
    case Format::bf16: return {upto<Plain<true>::Maker>(kPlainRows), kPlainRows};
    case Format::u8:
      return {w.mins ? upto<Quantized<false, true>::Maker>(kTileRows) : upto<Quantized<false, false>::Maker>(kTileRows), kTileRows};
    case Format::u4: break;
  }
  return {w.mins ? upto<Quantized<true, true>::Maker>(kTileRows) : upto<Quantized<true, false>::Maker>(kTileRows), kTileRows};
}

// Calls fn(first row, count) for tiles of nearly equal size: 9 rows are 5 and 4, never 8 and 1.
template <typename Fn>
void each_tile(int64_t m0, int64_t m1, int most, Fn fn) {
  const int64_t num = m1 - m0, tiles = (num + most - 1) / most;
  for (int64_t t = 0, m = m0; t < tiles; ++t) {
    const int64_t count = (num * (t + 1)) / tiles - (num * t) / tiles;
    fn(m, static_cast<int>(count));
    m += count;
  }
}

void finish(const Weight& w, int64_t block, const float* tile, int count, float* y, int64_t ldy, bool is_added) {
  const int64_t width = w.n - block * kLanes < kLanes ? w.n - block * kLanes : kLanes;
  const F bias = w.bias ? f_load(w.bias + block * kLanes) : f_zero();
  for (int m = 0; m < count; ++m) {
    F v = f_add(f_load(tile + m * kLanes), bias);
    float* out = y + m * ldy + block * kLanes;
    if (is_added) v = f_add(v, f_load_n(out, width));
    f_store_n(out, v, width);
  }
}

inline void prefetch_block(const Weight& w, int64_t block) {
  const uint8_t* p = w.data + block * w.block_bytes();
  for (int i = 0; i < 8; ++i) prefetch(p + 64 * i);
}

}  // namespace

void gemm(const Weight& w, const Rows& rows, int64_t m0, int64_t m1, int64_t b0, int64_t b1, float* y,
          int64_t ldy, bool is_added) {
  const Choice choice = choose(w);
  alignas(64) float tile[12 * kLanes];
  for (int64_t block = b0; block < b1; ++block) {
    if (block + 1 < b1) prefetch_block(w, block + 1);
    each_tile(m0, m1, choice.most, [&](int64_t m, int count) {
      choice.tiles[count - 1](w, rows, m, block, tile, kLanes);
      finish(w, block, tile, count, y + m * ldy, ldy, is_added);
    });
  }
}

namespace {
inline F activate(F x, Act act) {
  switch (act) {
    case Act::silu: return f_silu(x);
    case Act::gelu: return f_gelu(x);
    case Act::gelu_tanh: return f_gelu_tanh(x);
    case Act::relu: break;
  }
  return f_max(x, f_zero());
}
}  // namespace

void gemm_glu(const Weight& w, const Rows& rows, int64_t m0, int64_t m1, int64_t p0, int64_t p1, float* y,
              int64_t ldy, Act act) {
  const Choice choice = choose(w);
  alignas(64) float gate[12 * kLanes], up[12 * kLanes];
  const int64_t n = ldy;  // rows of the result lie side by side; w.n counts padding
  for (int64_t pair = p0; pair < p1; ++pair) {
    const int64_t width = n - pair * kLanes < kLanes ? n - pair * kLanes : kLanes;
    const F gate_bias = w.bias ? f_load(w.bias + 2 * pair * kLanes) : f_zero();
    const F up_bias = w.bias ? f_load(w.bias + (2 * pair + 1) * kLanes) : f_zero();
    each_tile(m0, m1, choice.most, [&](int64_t m, int count) {
      choice.tiles[count - 1](w, rows, m, 2 * pair, gate, kLanes);
      choice.tiles[count - 1](w, rows, m, 2 * pair + 1, up, kLanes);
      for (int i = 0; i < count; ++i) {
        const F g = activate(f_add(f_load(gate + i * kLanes), gate_bias), act);
        const F u = f_add(f_load(up + i * kLanes), up_bias);
        f_store_n(y + (m + i) * ldy + pair * kLanes, f_mul(g, u), width);
      }
    });
  }
}

}  // namespace mxn::MXN_NS

namespace mxn::MXN_NS {
int tile_rows() { return kTileRows; }
}  // namespace mxn::MXN_NS
