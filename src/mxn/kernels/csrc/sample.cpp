// A token from a row of logits, in one or two passes over the row. Neither copied nor sorted is more than
// the few candidates: blocks of 64 logits whose largest one is too small are never looked at again.
#include "sample.h"

#include "common.h"
#include "vec.h"

namespace mxn::MXN_NS {
namespace {

constexpr int64_t kFewBlocks = 64;        // hold nearly all that top-p keeps; if not, 16 times as many
constexpr int64_t kFewCandidates = 4096;  // more are narrowed down before they are parted one by one
constexpr int kHalvings = 12;
constexpr double kLeast = 1e-300;  // a mass that the best token alone exceeds

// A row and what is known of it. The values that count are logits divided by the temperature: with the
// very division of `naive.py`, so that they tie where its values tie.
class Row {
 public:
  Row(const float* x, int64_t n, float* scratch) : x_(x), n_(n), num_blocks_((n + kChoiceBlock - 1) / kChoiceBlock) {
    tops_ = scratch, sums_ = tops_ + num_blocks_;
    scaled = sums_ + num_blocks_, mass = scaled + n;
    copy_ = mass + n, copied_mass_ = copy_ + n;
    ids = reinterpret_cast<int32_t*>(copied_mass_ + n);
    const int64_t rest = n % kChoiceBlock;
    for (int64_t i = 0; rest && i < kChoiceBlock; ++i) tail_[i] = i < rest ? x[n - rest + i] : -INFINITY;
  }

  // Finds the largest value of each block. False: there is a NaN, or the largest of all is not finite.
  bool find_tops() {
    const F low = f_set(-3.0e38f), zero = f_zero();
    F fault = zero;  // NaN for NaN and +inf; -inf is usual where a grammar forbids
    most = -INFINITY;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      const float* p = block(b);
      F top = f_load(p);
      fault = f_fma(f_max(low, top), zero, fault);
      for (int64_t i = kLanes; i < kChoiceBlock; i += kLanes) {
        const F v = f_load(p + i);
        fault = f_fma(f_max(low, v), zero, fault);  // in this order a NaN stays one
        top = f_max(top, v);
      }
      tops_[b] = f_top(top);
      most = tops_[b] > most ? tops_[b] : most;
    }
    return f_sum(fault) == 0.0f && most > -INFINITY;
  }

  int64_t first_of_most() const {
    int64_t b = 0;
    while (tops_[b] != most) ++b;
    int64_t i = b * kChoiceBlock;
    while (x_[i] != most) ++i;
    return i;
  }

  // False: the largest is out of range.
  bool use_temperature(float t) {
    temperature_ = t, peak = most / t;
    return std::isfinite(peak);
  }

  // The mass of each block, exp(value - peak), and of all.
  double find_sums() {
    double all = 0.0;
    float buffer[kChoiceBlock];
    for (int64_t b = 0; b < num_blocks_; ++b) {
      sums_[b] = masses(b, buffer);
      all += static_cast<double>(sums_[b]);
    }
    return all;
  }

  // The token where the masses, added in token order, exceed `target`. After find_sums.
  int64_t token_at(double target) const {
    double reached = 0.0;
    int64_t b = 0, last = 0;
    while (b + 1 < num_blocks_ && reached + static_cast<double>(sums_[b]) <= target) reached += static_cast<double>(sums_[b++]);
    float buffer[kChoiceBlock];
    for (; b < num_blocks_; ++b) {  // rounding may leave a rest for the next block
      masses(b, buffer);
      for (int64_t i = 0; i < kChoiceBlock; ++i) {
        if (buffer[i] > 0.0f) last = b * kChoiceBlock + i;
        reached += static_cast<double>(buffer[i]);
        if (reached > target) return last;
      }
    }
    return last;
  }

  // A value that at least `count` values reach, or -inf: the count-th largest of the blocks' largest.
  float bound_for(int64_t count) {
    if (count > num_blocks_) return -INFINITY;
    for (int64_t b = 0; b < num_blocks_; ++b) copy_[b] = tops_[b] / temperature_;
    return floor_of(copy_, nullptr, num_blocks_, static_cast<double>(count));
  }

  // Makes candidates of all values that reach `bound`, in token order. Returns their mass.
  double gather(float bound) {
    num = 0;
    float buffer[kChoiceBlock];
    const F t = f_set(temperature_);
    for (int64_t b = 0; b < num_blocks_; ++b) {
      if (!(tops_[b] / temperature_ >= bound)) continue;
      const float* p = block(b);
      for (int64_t i = 0; i < kChoiceBlock; i += kLanes) f_store(buffer + i, f_div(f_load(p + i), t));
      const int64_t first = b * kChoiceBlock, size = n_ - first < kChoiceBlock ? n_ - first : kChoiceBlock;
      for (int64_t i = 0; i < size; ++i) {
        scaled[num] = buffer[i], ids[num] = static_cast<int32_t>(first + i);
        num += buffer[i] >= bound;
      }
    }
    return weigh();
  }

  // Drops candidates under `floor`. Returns the mass of the others.
  double keep(float floor) {
    int64_t kept = 0;
    for (int64_t i = 0; i < num; ++i) {
      scaled[kept] = scaled[i], mass[kept] = mass[i], ids[kept] = ids[i];
      kept += scaled[i] >= floor;
    }
    num = kept;
    return sum();
  }

  // The least value of a candidate such that those above it weigh less than `target` (or are fewer).
  float floor_by_count(int64_t count) {
    std::memcpy(copy_, scaled, static_cast<size_t>(num) * sizeof(float));
    return floor_of(copy_, nullptr, num, static_cast<double>(count));
  }
  float floor_by_mass(double target) {
    float low = -INFINITY, high = INFINITY;  // the floor is in [low, high)
    double above = 0.0;                      // the mass from `high` on
    if (num > kFewCandidates) {
      low = peak - 128.0f, high = peak + 1.0f;
      for (int i = 0; i < kHalvings; ++i) {
        const float middle = low + 0.5f * (high - low);
        const double mass_from = mass_over(middle);
        if (mass_from >= target) low = middle;
        else high = middle, above = mass_from;
      }
    }
    int64_t count = 0;
    for (int64_t i = 0; i < num; ++i) {
      copy_[count] = scaled[i], copied_mass_[count] = mass[i];
      count += (scaled[i] >= low) & (scaled[i] < high);
    }
    return count ? floor_of(copy_, copied_mass_, count, target - above) : low;
  }

  double sum() const {
    double all = 0.0;
    for (int64_t i = 0; i < num; ++i) all += static_cast<double>(mass[i]);
    return all;
  }

  float most = 0.0f, peak = 0.0f;
  int64_t num = 0;  // candidates
  float *scaled, *mass;
  int32_t* ids;

 private:
  const float* block(int64_t b) const {
    return (b + 1) * kChoiceBlock <= n_ ? x_ + b * kChoiceBlock : tail_;
  }

  float masses(int64_t b, float* out) const {
    const F t = f_set(temperature_), top = f_set(peak);
    const float* p = block(b);
    F sum = f_zero();
    for (int64_t i = 0; i < kChoiceBlock; i += kLanes) {
      const F m = f_exp(f_sub(f_div(f_load(p + i), t), top));
      f_store(out + i, m);
      sum = f_add(sum, m);
    }
    return f_sum(sum);
  }

  double weigh() {
    const F top = f_set(peak);
    for (int64_t i = 0; i < num; i += kLanes) {
      f_store_n(mass + i, f_exp(f_sub(f_load_n(scaled + i, num - i), top)), num - i);
    }
    return sum();
  }

  double mass_over(float low) const {
    const F least = f_set(low);
    F sum = f_zero();
    for (int64_t i = 0; i < num; i += kLanes) {
      const int64_t rest = num - i;
      const F m = rest < kLanes ? f_load_n(mass + i, rest) : f_load(mass + i);
      const F v = rest < kLanes ? f_load_n(scaled + i, rest) : f_load(scaled + i);
      sum = f_add(sum, f_zero_where_below(m, v, least));
    }
    return static_cast<double>(f_sum(sum));
  }

  static void swap(float* v, int64_t i, int64_t j) {
    const float kept = v[i];
    v[i] = v[j], v[j] = kept;
  }

  // The least of n values such that those above it weigh less than `target`; w null: each weighs 1. Like
  // a quicksort that goes into one part only; changes the order of both arrays.
  static float floor_of(float* v, float* w, int64_t n, double target) {
    double above = 0.0;  // the weight of what is known to be above
    float found = INFINITY;
    for (int64_t low = 0, high = n; low < high;) {
      const float a = v[low], b = v[low + (high - low) / 2], c = v[high - 1];
      const float pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
      int64_t greater = low, less = high;
      double greater_weight = 0.0, equal_weight = 0.0;
      for (int64_t i = low; i < less;) {
        const double weight = w ? static_cast<double>(w[i]) : 1.0;
        if (v[i] < pivot) {
          --less;
          swap(v, i, less);
          if (w) swap(w, i, less);
          continue;
        }
        if (v[i] > pivot) {
          greater_weight += weight;
          swap(v, i, greater);
          if (w) swap(w, i, greater);
          ++greater;
        } else {
          equal_weight += weight;
        }
        ++i;
      }
      if (above + greater_weight >= target) {
        high = greater;
        continue;
      }
      found = pivot, above += greater_weight + equal_weight;
      if (above >= target) break;
      low = less;
    }
    return found;
  }

  const float* x_;
  int64_t n_, num_blocks_;
  float *tops_, *sums_, *copy_, *copied_mass_;
  float temperature_ = 1.0f;
  float tail_[kChoiceBlock];
};

// Makes the candidates that top-p and min-p leave. `least`: what min-p asks for, or -inf.
void find_by_mass(Row& row, float top_p, float least) {
  const double target = static_cast<double>(top_p) * row.find_sums() + kLeast;
  double mass = 0.0;
  if (least > -INFINITY) {
    mass = row.gather(least);
  } else {
    float bound = 0.0f;
    for (int64_t blocks = kFewBlocks; bound > -INFINITY && mass < target; blocks *= 16) {
      mass = row.gather(bound = row.bound_for(blocks));
    }
  }
  if (mass >= target) row.keep(row.floor_by_mass(target));
}

}  // namespace

int64_t choose_token(const float* x, int64_t n, const ChoiceRule& rule, float* scratch) {
  if (n == 0) return -1;
  Row row(x, n, scratch);
  if (!row.find_tops()) return -1;
  if (rule.temperature == 0.0f) return row.first_of_most();
  if (!row.use_temperature(rule.temperature)) return -1;
  const double uniform = static_cast<double>(rule.uniform);
  const float least = rule.min_p > 0.0f ? row.peak + std::log(rule.min_p) : -INFINITY;
  if (rule.top_k > 0 && rule.top_k < n) {
    row.gather(row.bound_for(rule.top_k));
    const double all = row.keep(row.floor_by_count(rule.top_k));
    if (rule.top_p < 1.0f) row.keep(row.floor_by_mass(static_cast<double>(rule.top_p) * all + kLeast));
  } else if (rule.top_p < 1.0f) {
    find_by_mass(row, rule.top_p, least);
  } else if (rule.min_p > 0.0f) {
    row.gather(least);
  } else {
    return row.token_at(uniform * row.find_sums());
  }
  const double target = uniform * row.keep(least);
  double reached = 0.0;
  for (int64_t i = 0; i < row.num; ++i) {
    reached += static_cast<double>(row.mass[i]);
    if (reached > target) return row.ids[i];
  }
  return row.ids[row.num - 1];
}

}  // namespace mxn::MXN_NS
