// Mixture of experts: rows are sorted by expert, so that each expert that is used is read once.
#include "moe.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mxn {
namespace {

// Scores [E] of one token become the chosen experts and their weights; scores are overwritten.
void route(const Moe& moe, float* scores, int64_t* chosen, float* weights) {
  const int num = moe.num_experts, k = moe.top_k;
  if (moe.is_sigmoid) {
    for (int e = 0; e < num; ++e) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
  } else {
    const float top = *std::max_element(scores, scores + num);
    float sum = 0.0f;
    for (int e = 0; e < num; ++e) sum += scores[e] = std::exp(scores[e] - top);
    for (int e = 0; e < num; ++e) scores[e] /= sum;
  }
  std::vector<float> rank(scores, scores + num);
  if (moe.bias) {
    for (int e = 0; e < num; ++e) rank[static_cast<size_t>(e)] += moe.bias[e];
  }
  if (moe.num_groups > 1) {
    const int size = num / moe.num_groups;
    std::vector<std::pair<float, int>> groups;
    for (int g = 0; g < moe.num_groups; ++g) {
      std::vector<float> part(rank.begin() + g * size, rank.begin() + (g + 1) * size);
      const int best = moe.is_top2_sum ? std::min(2, size) : 1;
      std::partial_sort(part.begin(), part.begin() + best, part.end(), std::greater<>());
      groups.emplace_back(-std::accumulate(part.begin(), part.begin() + best, 0.0f), g);
    }
    std::sort(groups.begin(), groups.end());
    for (size_t g = static_cast<size_t>(moe.top_groups); g < groups.size(); ++g) {
      std::fill_n(rank.begin() + groups[g].second * size, size, -INFINITY);
    }
  }
  std::vector<int> order(static_cast<size_t>(num));
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int a, int b) {
    const float x = rank[static_cast<size_t>(a)], y = rank[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  float sum = 0.0f;
  for (int i = 0; i < k; ++i) {
    chosen[i] = order[static_cast<size_t>(i)];
    sum += weights[i] = scores[chosen[i]];
  }
  for (int i = 0; i < k; ++i) weights[i] = (moe.is_normalized ? weights[i] / (sum + 1e-20f) : weights[i]) * moe.scale;
}

}  // namespace

void Decoder::mixture(Pool& pool, const Layer& layer, int64_t m, const float* x, float* y) {
  const Moe& moe = layer.moe;
  const Kernels& k = kernels();
  Experts& e = *experts_;
  const int64_t top = moe.top_k, num = m * top;
  if (num == 0) return;  // no expert is used, and work is divided by their number
  float* normed = e.normed.at_least(m * hidden);
  for (int64_t t = 0; t < m; ++t) {
    if (layer.pre_ffn) k.rms_norm(x + t * hidden, layer.pre_ffn, normed + t * hidden, hidden, eps);
    else std::copy_n(x + t * hidden, hidden, normed + t * hidden);
  }
  Rows plain;
  plain.x = normed, plain.ld = hidden, plain.k_padded = hidden;
  float* scores = e.scores.at_least(m * moe.num_experts);
  multiply(pool, moe.router, plain, m, scores, moe.num_experts, false);
  e.chosen.resize(static_cast<size_t>(num));
  float* weights = e.weights.at_least(num);
  for (int64_t t = 0; t < m; ++t) {
    route(moe, scores + t * moe.num_experts, e.chosen.data() + t * top, weights + t * top);
  }
  // Counting sort: `order` lists (token, place) pairs expert by expert.
  e.starts.assign(static_cast<size_t>(moe.num_experts) + 1, 0);
  for (int64_t expert : e.chosen) ++e.starts[static_cast<size_t>(expert) + 1];
  std::partial_sum(e.starts.begin(), e.starts.end(), e.starts.begin());
  std::vector<int64_t> next(e.starts.begin(), e.starts.end() - 1), used, row_of(static_cast<size_t>(num));
  for (int64_t i = 0; i < num; ++i) {
    row_of[static_cast<size_t>(i)] = next[static_cast<size_t>(e.chosen[static_cast<size_t>(i)])]++;
  }
  for (int64_t i = 0; i < moe.num_experts; ++i) {
    if (e.starts[static_cast<size_t>(i)] < e.starts[static_cast<size_t>(i) + 1]) used.push_back(i);
  }
  const Mlp& shape = moe.experts[0];
  const Rows& rows = packed_.make(pool, shape.up, normed, hidden, m, nullptr, eps, act_group);
  e.gathered.reserve(shape.up, num, act_group);
  if (shape.up.is_quantized()) {
    for (int64_t i = 0; i < num; ++i) e.gathered.copy(row_of[static_cast<size_t>(i)], packed_, i / top);
  } else {
    for (int64_t i = 0; i < num; ++i) e.gathered.put(row_of[static_cast<size_t>(i)], rows.x + i / top * rows.ld);
  }
  float* inner = e.inner.at_least(num * shape.intermediate);
  const int64_t up_units = (shape.is_gated ? shape.up.num_blocks() / 2 : shape.up.num_blocks());
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(up_units, 16 * pool.num_threads() / static_cast<int64_t>(used.size())));
  pool.run(static_cast<int64_t>(used.size()) * parts, [&](int64_t item, int) {
    const int64_t expert = used[static_cast<size_t>(item / parts)], part = item % parts;
    const Mlp& mlp = moe.experts[static_cast<size_t>(expert)];
    const int64_t m0 = e.starts[static_cast<size_t>(expert)], m1 = e.starts[static_cast<size_t>(expert) + 1];
    const int64_t u0 = up_units * part / parts, u1 = up_units * (part + 1) / parts;
    if (mlp.is_gated) k.gemm_glu(mlp.up, e.gathered.rows(), m0, m1, u0, u1, inner, mlp.intermediate, mlp.act);
    else k.gemm(mlp.up, e.gathered.rows(), m0, m1, u0, u1, inner, mlp.intermediate, false);
  });
  if (!shape.is_gated) k.activate(inner, inner, num * shape.intermediate, shape.act);
  const Rows& middle = e.middle.make(pool, shape.down, inner, shape.intermediate, num, nullptr, eps, act_group);
  float* outer = e.outer.at_least(num * hidden);
  const int64_t blocks = shape.down.num_blocks();
  const int64_t down_parts = std::max<int64_t>(1, std::min<int64_t>(blocks, 16 * pool.num_threads() / static_cast<int64_t>(used.size())));
  pool.run(static_cast<int64_t>(used.size()) * down_parts, [&](int64_t item, int) {
    const int64_t expert = used[static_cast<size_t>(item / down_parts)], part = item % down_parts;
    const int64_t m0 = e.starts[static_cast<size_t>(expert)], m1 = e.starts[static_cast<size_t>(expert) + 1];
    k.gemm(moe.experts[static_cast<size_t>(expert)].down, middle, m0, m1, blocks * part / down_parts,
           blocks * (part + 1) / down_parts, outer, hidden, false);
  });
  if (moe.has_shared) {
    const Rows& again = inner_.make(pool, moe.shared.up, normed, hidden, m, nullptr, eps, act_group);
    mlp(pool, moe.shared, again, m, y, false);
    if (moe.has_shared_gate) {
      float* gates = e.scores.at_least(m);
      multiply(pool, moe.shared_gate, plain, m, gates, 1, false);
      for (int64_t t = 0; t < m; ++t) {
        const float gate = 1.0f / (1.0f + std::exp(-gates[t]));
        for (int64_t i = 0; i < hidden; ++i) y[t * hidden + i] *= gate;
      }
    }
  } else {
    std::fill(y, y + m * hidden, 0.0f);
  }
  pool.run(m, [&](int64_t t, int) {
    for (int64_t i = t * top; i < (t + 1) * top; ++i) {
      k.add(outer + row_of[static_cast<size_t>(i)] * hidden, weights[i], y + t * hidden, hidden);
    }
  });
}

}  // namespace mxn
