// Products spread over threads, and rows made ready for them.
#include <algorithm>
#include <cstring>

#include "decoder.h"

namespace mxn {
namespace {

constexpr int64_t kRowBytes = 512 << 10;  // rows of one item: half of a core's second cache
constexpr int64_t kItemsPerThread = 8;    // small enough that a slow thread delays little
constexpr int64_t kSerialRows = 4;        // fewer are made ready faster than other threads wake

int64_t rows_at_once(const Weight& w, int64_t m) {
  const int64_t bytes = w.is_quantized() ? w.k_padded : 4 * w.k;
  const int64_t most = std::max<int64_t>(48, kRowBytes / std::max<int64_t>(1, bytes));
  const int64_t parts = (m + most - 1) / most;
  return (m + parts - 1) / parts;
}

// Calls fn(m0, m1, u0, u1) for ranges of rows and of `units` blocks that together cover the product.
template <typename Fn>
void spread(Pool& pool, const Weight& w, int64_t m, int64_t units, const Fn& fn) {
  if (m == 0) return;
  const int64_t step_m = rows_at_once(w, m), parts_m = (m + step_m - 1) / step_m;
  const int64_t wanted = std::max<int64_t>(1, kItemsPerThread * pool.num_threads() / parts_m);
  const int64_t parts_u = pool.num_threads() == 1 ? 1 : std::min(units, wanted);
  pool.run(parts_m * parts_u, [&](int64_t item, int) {
    const int64_t i = item / parts_u, j = item % parts_u;
    fn(i * step_m, std::min(m, (i + 1) * step_m), units * j / parts_u, units * (j + 1) / parts_u);
  });
}

// The rows with `tiled` made, where there are so many that it pays.
Rows tiled(Pool& pool, const Weight& w, const Rows& rows, int64_t m) {
  if (!w.is_quantized() || m == 0 || m < w.tiled_from) return rows;
  static thread_local Buffer<int8_t> memory;  // of the caller: it lives until the product is done
  int8_t* to = memory.at_least(m * rows.k_padded);
  const int64_t step = rows_at_once(w, m), parts = (m + step - 1) / step;
  const auto tile = kernels().tile_rows_of;
  pool.run(parts, [&](int64_t i, int) { tile(rows, i * step, std::min(m, (i + 1) * step), to); });
  Rows found = rows;
  found.tiled = to;
  return found;
}

}  // namespace

void multiply(Pool& pool, const Weight& w, const Rows& given, int64_t m, float* y, int64_t ldy, bool is_added) {
  const auto gemm = kernels().gemm;
  const Rows rows = tiled(pool, w, given, m);
  spread(pool, w, m, w.num_blocks(), [&](int64_t m0, int64_t m1, int64_t b0, int64_t b1) {
    gemm(w, rows, m0, m1, b0, b1, y, ldy, is_added);
  });
}

void multiply_glu(Pool& pool, const Weight& w, const Rows& given, int64_t m, float* y, int64_t ldy, Act act) {
  const auto gemm = kernels().gemm_glu;
  const Rows rows = tiled(pool, w, given, m);
  spread(pool, w, m, w.num_blocks() / 2, [&](int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
    gemm(w, rows, m0, m1, p0, p1, y, ldy, act);
  });
}

const Rows& Packed::reserve(const Weight& w, int64_t m, int64_t act_group) {
  is_quantized_ = w.is_quantized();
  k_ = w.k;
  rows_ = Rows{};
  rows_.k_padded = w.k_padded;
  if (!is_quantized_) {
    rows_.x = x_.at_least(m * k_);
    rows_.ld = k_;
    return rows_;
  }
  const bool is_grouped = w.group < w.k_padded;
  const bool divides = act_group > 0 && w.k_padded % act_group == 0;
  rows_.group = is_grouped ? w.group : divides ? act_group : w.k_padded;
  rows_.num_groups = w.k_padded / rows_.group;
  rows_.q = q_.at_least(m * w.k_padded);
  rows_.scales = scales_.at_least(m * rows_.num_groups);
  rows_.sums = sums_.at_least(m * rows_.num_groups);
  rows_.isums = isums_.at_least(m * rows_.num_groups);
  return rows_;
}

void Packed::put(int64_t row, const float* x) {
  if (!is_quantized_) {
    std::memcpy(const_cast<float*>(rows_.x) + row * k_, x, static_cast<size_t>(k_) * sizeof(float));
    return;
  }
  const int64_t g = row * rows_.num_groups;
  kernels().quantize(x, k_, rows_.k_padded, rows_.group, const_cast<int8_t*>(rows_.q) + row * rows_.k_padded,
                     const_cast<float*>(rows_.scales) + g, const_cast<float*>(rows_.sums) + g,
                     const_cast<int32_t*>(rows_.isums) + g);
}

void Packed::copy(int64_t row, const Packed& from, int64_t from_row) {
  const Rows& f = from.rows_;
  if (!is_quantized_) {
    std::memcpy(const_cast<float*>(rows_.x) + row * k_, f.x + from_row * f.ld, static_cast<size_t>(k_) * sizeof(float));
    return;
  }
  const int64_t g = rows_.num_groups;
  const size_t bytes = static_cast<size_t>(g) * 4;
  std::memcpy(const_cast<int8_t*>(rows_.q) + row * rows_.k_padded, f.q + from_row * f.k_padded,
              static_cast<size_t>(rows_.k_padded));
  std::memcpy(const_cast<float*>(rows_.scales) + row * g, f.scales + from_row * g, bytes);
  std::memcpy(const_cast<float*>(rows_.sums) + row * g, f.sums + from_row * g, bytes);
  std::memcpy(const_cast<int32_t*>(rows_.isums) + row * g, f.isums + from_row * g, bytes);
}

const Rows& Packed::make(Pool& pool, const Weight& w, const float* x, int64_t ld, int64_t m, const float* norm,
                         float eps, int64_t act_group) {
  if (!w.is_quantized() && !norm) {  // the rows as they are, without room for a copy
    is_quantized_ = false;
    k_ = w.k;
    rows_ = Rows{};
    rows_.x = x;
    rows_.ld = ld;
    return rows_;
  }
  reserve(w, m, act_group);
  const auto rms_norm = kernels().rms_norm;
  float* normed = is_quantized_ && norm ? x_.at_least(pool.num_threads() * k_) : nullptr;
  auto one = [&](int64_t row, int thread) {
    const float* from = x + row * ld;
    if (!is_quantized_) {
      rms_norm(from, norm, const_cast<float*>(rows_.x) + row * k_, k_, eps);
      return;
    }
    if (norm) {
      rms_norm(from, norm, normed + thread * k_, k_, eps);
      from = normed + thread * k_;
    }
    put(row, from);
  };
  if (m < kSerialRows) {
    for (int64_t row = 0; row < m; ++row) one(row, 0);
  } else {
    pool.run(m, one);
  }
  return rows_;
}

}  // namespace mxn
