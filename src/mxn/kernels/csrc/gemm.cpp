// Products of rows with packed weights. A tile is some rows times one block of 16 output features; its
// weights are unpacked once for all rows, and its sums stay in registers over the whole of K.
#include "act.h"
#include "common.h"
#include "vec.h"
#if defined(MXN_AMX)
#include "amx.h"
#endif

namespace mxn::MXN_NS {
namespace {

constexpr int64_t kAhead = 4096;  // bytes of weights fetched ahead: what a core reads while memory answers

// What a tile fetches beside its work: with each 64 bytes that it reads, the line at `at`, `step` bytes
// further on every time.
struct Fetch {
  const uint8_t* at;
  int64_t step;
  template <bool IS_FAR>
  void next() {
    if constexpr (IS_FAR) prefetch_far(at);
    else prefetch(at);
    at += step;
  }
};

using Tile = void (*)(const Weight&, const Rows&, int64_t m, int64_t block, Fetch, float* y);

// One group of K for MR rows: sums += scale * (dot - offset * sum of activations).
// Rows of a tile where they lie, or interleaved as one stream, which the processor fetches ahead.
template <int MR, bool IS_TILED>
struct Values {
  const int8_t* a[IS_TILED ? 1 : MR];
  int32_t at(int m, int64_t k) const {
    return IS_TILED ? four_bytes(a[0] + k * MR + 4 * m) : four_bytes(a[IS_TILED ? 0 : m] + k);
  }
};

// Columns of one step, and the 64-byte lines of weights that hold them.
template <int BITS>
constexpr int64_t kStepColumns = BITS == 4 ? 8 : BITS == 6 ? 16 : 4;
template <int BITS>
constexpr int64_t kStepLines = BITS == 6 ? 3 : 1;

template <int MR, int BITS, bool IS_TILED>
inline void dot_group(const uint8_t*& w, const Values<MR, IS_TILED>& a, int64_t k, int64_t length, Fetch& fetch,
                      I (&sum)[MR]) {
  // Bytes come twice as fast as nibbles: beside the rows of several tiles they overrun the first cache.
  constexpr bool kIsFar = BITS == 8 && MR > 4;
  for (int64_t i = k; i < k + length; i += kStepColumns<BITS>, w += 64 * kStepLines<BITS>) {
    for (int line = 0; line < kStepLines<BITS>; ++line) fetch.next<kIsFar>();
    if constexpr (BITS == 4) {
      const B packed = b_load(w), low = b_low(packed), high = b_high(packed);
      for (int m = 0; m < MR; ++m) sum[m] = dot_u7(sum[m], low, a.at(m, i));
      for (int m = 0; m < MR; ++m) sum[m] = dot_u7(sum[m], high, a.at(m, i + 4));
    } else if constexpr (BITS == 6) {
      for (int part = 0; part < 4; ++part) {
        const B values = b_six(w, part);
        for (int m = 0; m < MR; ++m) sum[m] = dot_u7(sum[m], values, a.at(m, i + 4 * part));
      }
    } else {
      const B packed = b_load(w);
      for (int m = 0; m < MR; ++m) sum[m] = dot_u8(sum[m], packed, a.at(m, i));
    }
  }
}

// A few rows leave room for independent sums over K, which hide the latency of the dot product.
template <int MR, int BITS, bool IS_TILED>
inline void dot_group_deep(const uint8_t*& w, const Values<MR, IS_TILED>& a, int64_t k, int64_t length,
                           Fetch& fetch, I (&sum)[MR]) {
  I other[MR];
  for (int m = 0; m < MR; ++m) other[m] = i_zero();
  int64_t i = k;
  if constexpr (BITS == 6) {
    for (; i < k + length; i += 16, w += 192) {
      for (int line = 0; line < 3; ++line) fetch.next<false>();
      const B v0 = b_six(w, 0), v1 = b_six(w, 1), v2 = b_six(w, 2), v3 = b_six(w, 3);
      for (int m = 0; m < MR; ++m) {
        sum[m] = dot_u7(sum[m], v0, a.at(m, i));
        other[m] = dot_u7(other[m], v1, a.at(m, i + 4));
        sum[m] = dot_u7(sum[m], v2, a.at(m, i + 8));
        other[m] = dot_u7(other[m], v3, a.at(m, i + 12));
      }
    }
  } else {
    constexpr int64_t kStep = kStepColumns<BITS>;
    for (; i + 2 * kStep <= k + length; i += 2 * kStep, w += 128) {
      const B first = b_load(w), second = b_load(w + 64);
      fetch.next<false>();
      fetch.next<false>();
      if constexpr (BITS == 4) {
        const B l0 = b_low(first), h0 = b_high(first), l1 = b_low(second), h1 = b_high(second);
        for (int m = 0; m < MR; ++m) {
          sum[m] = dot_u7(sum[m], l0, a.at(m, i));
          other[m] = dot_u7(other[m], h0, a.at(m, i + 4));
          sum[m] = dot_u7(sum[m], l1, a.at(m, i + 8));
          other[m] = dot_u7(other[m], h1, a.at(m, i + 12));
        }
      } else {
        for (int m = 0; m < MR; ++m) {
          sum[m] = dot_u8(sum[m], first, a.at(m, i));
          other[m] = dot_u8(other[m], second, a.at(m, i + 4));
        }
      }
    }
    dot_group<MR, BITS, IS_TILED>(w, a, i, k + length - i, fetch, sum);
  }
  for (int m = 0; m < MR; ++m) sum[m] = i_add(sum[m], other[m]);
}

template <int MR, int BITS, bool HAS_MIN, bool IS_TILED>
void quantized_tile(const Weight& w, const Rows& rows, int64_t m0, int64_t block, Fetch fetch, float* y) {
  // A scale for each feature (group = all of K) is applied once, behind the activations' own groups.
  const bool is_grouped = w.group < w.k_padded;
  const int64_t length = is_grouped ? w.group : rows.group, num_groups = w.k_padded / length;
  const int64_t act_step = rows.num_groups == num_groups ? 1 : 0;
  const uint16_t* scales = w.scales + block * w.num_groups() * kLanes;
  const uint16_t* mins = HAS_MIN ? w.mins + block * w.num_groups() * kLanes : nullptr;
  const uint8_t* data = w.data + block * w.block_bytes();
  const int32_t offset = HAS_MIN ? 0 : -(1 << (BITS - 1));
  Values<MR, IS_TILED> a;
  F total[MR];
  if constexpr (IS_TILED) a.a[0] = rows.tiled + m0 * rows.k_padded;
  for (int m = 0; m < MR; ++m) {
    if constexpr (!IS_TILED) a.a[m] = rows.q + (m0 + m) * rows.k_padded;
    total[m] = f_zero();
  }
  const F ones = f_set(1.0f);
  for (int64_t g = 0; g < num_groups; ++g) {
    I sum[MR];
    const int64_t at = m0 * rows.num_groups + g * act_step;
    for (int m = 0; m < MR; ++m) {
      sum[m] = HAS_MIN ? i_zero() : i_set(offset * rows.isums[at + m * rows.num_groups]);
    }
    if constexpr (MR <= 4) dot_group_deep<MR, BITS, IS_TILED>(data, a, g * length, length, fetch, sum);
    else dot_group<MR, BITS, IS_TILED>(data, a, g * length, length, fetch, sum);
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
  for (int m = 0; m < MR; ++m) f_store(y + m * kLanes, f_mul(total[m], gain));
}

template <int MR, bool IS_BF16>
void plain_tile(const Weight& w, const Rows& rows, int64_t m0, int64_t block, Fetch, float* y) {
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
  for (int m = 0; m < MR; ++m) f_store(y + m * kLanes, f_add(even[m], odd[m]));
}

template <template <int> class Maker, int... MR>
struct Table {
  static constexpr Tile tiles[] = {Maker<MR>::tile...};
};

template <int BITS, bool HAS_MIN, bool IS_TILED>
struct Quantized {
  template <int MR>
  struct Maker { static constexpr Tile tile = quantized_tile<MR, BITS, HAS_MIN, IS_TILED>; };
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

template <int BITS, bool IS_TILED>
Choice choose_quantized(const Weight& w) {
  const Tile* tiles = w.mins ? upto<Quantized<BITS, true, IS_TILED>::template Maker>(kTileRows)
                             : upto<Quantized<BITS, false, IS_TILED>::template Maker>(kTileRows);
  return {tiles, kTileRows};
}

Choice choose(const Weight& w, const Rows& rows) {
  switch (w.format) {
    case Format::f32: return {upto<Plain<false>::Maker>(kPlainRows), kPlainRows};
    case Format::bf16: return {upto<Plain<true>::Maker>(kPlainRows), kPlainRows};
    case Format::u4: return rows.tiled ? choose_quantized<4, true>(w) : choose_quantized<4, false>(w);
    case Format::u6: return rows.tiled ? choose_quantized<6, true>(w) : choose_quantized<6, false>(w);
    case Format::u8: break;
  }
  return rows.tiled ? choose_quantized<8, true>(w) : choose_quantized<8, false>(w);
}

// Calls fn(first row, count, index, tiles) for tiles of nearly equal size: 9 rows are 5 and 4, never 8 and 1.
template <typename Fn>
void each_tile(int64_t m0, int64_t m1, int most, Fn fn) {
  const int64_t num = m1 - m0, tiles = (num + most - 1) / most;
  for (int64_t t = 0, m = m0; t < tiles; ++t) {
    const int64_t count = (num * (t + 1)) / tiles - (num * t) / tiles;
    fn(m, static_cast<int>(count), t, tiles);
    m += count;
  }
}

// One tile fetches a little ahead of itself. Of several, each fetches its part of the block that comes
// `stride` blocks later, so that memory is as busy under the last as under the first.
Fetch fetch_of(const Weight& w, int64_t block, int64_t stride, int64_t tile, int64_t tiles) {
  const uint8_t* data = w.data + block * w.block_bytes();
  if (tiles == 1) return {data + kAhead, 64};
  const int64_t step = tiles < 64 ? 64 / tiles : 1;
  return {data + stride * w.block_bytes() + w.block_bytes() * tile / tiles, step};
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

#if defined(MXN_AMX)

bool fits_tiles(const Weight& w, const Rows& rows) {
  if (!w.is_quantized() || w.k_padded % kTileK) return false;
  const int64_t length = w.group < w.k_padded ? w.group : rows.group;
  return length % kTileK == 0;
}

// 64 columns of a block of 4 or 6 bits as bytes, [16 quads][16 features][4].
inline void widen(Format format, const uint8_t* packed, uint8_t* wide) {
  if (format == Format::u6) {
    for (int i = 0; i < kTileK / 4; ++i) b_store(wide + 64 * i, b_six(packed + i / 4 * 192, i % 4));
    return;
  }
  for (int i = 0; i < kTileK / 8; ++i) {
    const B v = b_load(packed + 64 * i);
    b_store(wide + 128 * i, b_low(v));
    b_store(wide + 128 * i + 64, b_high(v));
  }
}

// 16 rows of one block, into tile [16][16].
void amx_tile(Tiles& tiles, const Weight& w, const Rows& rows, int64_t m0, int64_t block, float* tile) {
  const bool is_grouped = w.group < w.k_padded, is_wide = w.format == Format::u8;
  const int64_t length = is_grouped ? w.group : rows.group, num_groups = w.k_padded / length;
  const int64_t act_step = rows.num_groups == num_groups ? 1 : 0;
  const uint16_t* scales = w.scales + block * w.num_groups() * kLanes;
  const uint16_t* mins = w.mins ? w.mins + block * w.num_groups() * kLanes : nullptr;
  const uint8_t* data = w.data + block * w.block_bytes();
  const int32_t offset = w.mins ? 0 : -w.middle();
  alignas(64) int32_t sums[kTileM * kLanes];
  alignas(64) uint8_t wide[kTileK * kLanes];
  for (int m = 0; m < kTileM; ++m) f_store(tile + m * kLanes, f_zero());
  for (int64_t g = 0; g < num_groups; ++g) {
    tiles.zero(0);
    for (int64_t k = g * length; k < (g + 1) * length; k += kTileK) {
      const uint8_t* b = data + k * kLanes;
      if (!is_wide) {
        widen(w.format, data + k * kLanes * w.bits() / 8, wide);
        b = wide;
      }
      tiles.multiply<0>(rows.q + m0 * rows.k_padded + k, rows.k_padded, b);
    }
    tiles.store<0>(sums);
    const F scale = is_grouped ? f_half(scales + g * kLanes) : f_set(1.0f);
    for (int m = 0; m < kTileM; ++m) {
      const int64_t at = (m0 + m) * rows.num_groups + g * act_step;
      const F dot = f_int(i_add(i_load(sums + m * kLanes), i_set(offset * rows.isums[at])));
      F total = f_fma(dot, f_mul(scale, f_set(rows.scales[at])), f_load(tile + m * kLanes));
      if (mins && is_grouped) total = f_fnma(f_half(mins + g * kLanes), f_set(rows.sums[at]), total);
      f_store(tile + m * kLanes, total);
    }
  }
  for (int m = 0; m < kTileM; ++m) {
    F total = f_load(tile + m * kLanes);
    if (!is_grouped) {
      total = f_mul(total, f_half(scales));
      if (mins) {
        float all = 0.0f;
        for (int64_t g = 0; g < rows.num_groups; ++g) all += rows.sums[(m0 + m) * rows.num_groups + g];
        total = f_fnma(f_half(mins), f_set(all), total);
      }
    }
    f_store(tile + m * kLanes, f_mul(total, f_set(w.gain)));
  }
}

#endif

// Calls fn(first row, count, compute) for the tiles of rows [m0, m1); compute(block, tile) fills one.
// `stride`: the block that follows one, counted in blocks.
template <typename Fn>
void each_product(const Weight& w, const Rows& rows, int64_t m0, int64_t m1, int64_t stride, Fn fn) {
  const Choice choice = choose(w, rows);
#if defined(MXN_AMX)
  if (m1 - m0 >= kTileM && !rows.tiled && fits_tiles(w, rows)) {
    Tiles tiles;
    for (; m1 - m0 >= kTileM; m0 += kTileM) {
      fn(m0, kTileM, [&](int64_t block, float* tile) { amx_tile(tiles, w, rows, m0, block, tile); });
    }
  }
#endif
  each_tile(m0, m1, choice.most, [&](int64_t m, int count, int64_t index, int64_t tiles) {
    fn(m, count, [&](int64_t block, float* tile) {
      choice.tiles[count - 1](w, rows, m, block, fetch_of(w, block, stride, index, tiles), tile);
    });
  });
}

inline void prefetch_block(const Weight& w, int64_t block) {
  const uint8_t* p = w.data + block * w.block_bytes();
  for (int i = 0; i < 8; ++i) prefetch(p + 64 * i);
}

}  // namespace

void gemm(const Weight& w, const Rows& rows, int64_t m0, int64_t m1, int64_t b0, int64_t b1, float* y,
          int64_t ldy, bool is_added) {
  alignas(64) float tile[16 * kLanes];
  for (int64_t block = b0; block < b1; ++block) {
    if (block + 1 < b1) prefetch_block(w, block + 1);
    each_product(w, rows, m0, m1, 1, [&](int64_t m, int count, const auto& compute) {
      compute(block, tile);
      finish(w, block, tile, count, y + m * ldy, ldy, is_added);
    });
  }
}

void gemm_glu(const Weight& w, const Rows& rows, int64_t m0, int64_t m1, int64_t p0, int64_t p1, float* y,
              int64_t ldy, Act act) {
  alignas(64) float gate[16 * kLanes], up[16 * kLanes];
  const int64_t n = ldy;  // rows of the result lie side by side; w.n counts padding
  for (int64_t pair = p0; pair < p1; ++pair) {
    const int64_t width = n - pair * kLanes < kLanes ? n - pair * kLanes : kLanes;
    const F gate_bias = w.bias ? f_load(w.bias + 2 * pair * kLanes) : f_zero();
    const F up_bias = w.bias ? f_load(w.bias + (2 * pair + 1) * kLanes) : f_zero();
    each_product(w, rows, m0, m1, 2, [&](int64_t m, int count, const auto& compute) {
      compute(2 * pair, gate);
      compute(2 * pair + 1, up);
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

void tile_rows_of(const Rows& rows, int64_t m0, int64_t m1, int8_t* tiled) {
  each_tile(m0, m1, kTileRows, [&](int64_t m, int count, int64_t, int64_t) {
    int32_t* to = reinterpret_cast<int32_t*>(tiled + m * rows.k_padded);
    const int64_t quads = rows.k_padded / 4;
    for (int r = 0; r < count; ++r) {
      const int8_t* from = rows.q + (m + r) * rows.k_padded;
      for (int64_t k = 0; k < quads; ++k) to[k * count + r] = four_bytes(from + 4 * k);
    }
  });
}

int tile_rows() { return kTileRows; }
}  // namespace mxn::MXN_NS
