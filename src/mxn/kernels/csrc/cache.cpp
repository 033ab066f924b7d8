// Writes the key and the value of one token into the cache, as `CacheShape` lays them out.
#include "common.h"
#include "vec.h"

namespace mxn::MXN_NS {

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
