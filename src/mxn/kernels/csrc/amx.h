// Tiles of 16 rows of int8 products: AMX where there is one, or the same in plain C++ (MXN_AMX_EMULATED)
// so that what surrounds the instructions can be tested on any processor.
#pragma once
#include <cstdint>
#include <cstring>

#if !defined(MXN_AMX_EMULATED)
#include <immintrin.h>
#endif

namespace mxn::MXN_NS {

constexpr int kTileK = 64;  // columns of one step
constexpr int kTileM = 16;

#if defined(MXN_AMX_EMULATED)

struct Tiles {
  int32_t sum[2][16][16];
  Tiles() {}
  void zero(int c) { std::memset(sum[c], 0, sizeof sum[c]); }
  // sum[c] += a [16 rows, stride] (signed) times b [16 quads][16 features][4] (unsigned).
  template <int C>
  void multiply(const int8_t* a, int64_t stride, const uint8_t* b) {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < kTileK; ++k) sum[C][m][n] += a[m * stride + k] * b[(k / 4 * 16 + n) * 4 + k % 4];
      }
    }
  }
  template <int C>
  void store(int32_t* to) { std::memcpy(to, sum[C], sizeof sum[C]); }
};

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 1 hold sums, 2 the activations, 3 the weights.
struct Tiles {
  Tiles() {
    TileConfig config;
    for (int i = 0; i < 4; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  void zero(int c) {
    if (c == 0) _tile_zero(0);
    else _tile_zero(1);
  }
  template <int C>
  void multiply(const int8_t* a, int64_t stride, const uint8_t* b) {
    _tile_loadd(2, a, stride);
    _tile_loadd(3, b, 64);
    if constexpr (C == 0) _tile_dpbsud(0, 2, 3);
    else _tile_dpbsud(1, 2, 3);
  }
  template <int C>
  void store(int32_t* to) {
    if constexpr (C == 0) _tile_stored(0, to, 64);
    else _tile_stored(1, to, 64);
  }
};

#endif

}  // namespace mxn::MXN_NS
