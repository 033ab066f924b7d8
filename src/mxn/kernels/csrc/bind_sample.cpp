// What Python sees of choosing tokens: rows on threads, and logits that are edited for as long as it takes.
#include "bind_sample.h"

#include <nanobind/ndarray.h>

#include <stdexcept>
#include <vector>

#include "pool.h"
#include "sample.h"
#include "variants.h"

namespace nb = nanobind;

namespace mxn {
namespace {

using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Amounts = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct Logits {
  float* x;
  int64_t ld, num_rows, num_tokens;
};

// Changes some logits, and puts them back at its end.
class Edited {
 public:
  explicit Edited(const Logits& logits) : logits_(logits) {}
  Edited(const Edited&) = delete;
  Edited& operator=(const Edited&) = delete;
  ~Edited() {  // the last change first: a token may have several
    for (size_t i = places_.size(); i-- > 0;) *places_[i] = before_[i];
  }

  // Throws std::invalid_argument for a row or a token that does not exist.
  void apply(nb::handle edit) {
    const nb::tuple parts = nb::borrow<nb::tuple>(edit);
    const int64_t row = nb::cast<int64_t>(parts[0]);
    const Ids ids = nb::cast<Ids>(parts[1]);
    const float repetition = nb::cast<float>(parts[2]);
    const Amounts amounts = nb::cast<Amounts>(parts[3]);
    if (row < 0 || row >= logits_.num_rows) throw std::invalid_argument("choose: no row " + std::to_string(row));
    if (ids.shape(0) != amounts.shape(0)) throw std::invalid_argument("choose: as many amounts as tokens");
    for (size_t i = 0; i < ids.shape(0); ++i) {
      const int64_t id = ids.data()[i];
      if (id < 0 || id >= logits_.num_tokens) throw std::invalid_argument("choose: no token " + std::to_string(id));
      float* place = logits_.x + row * logits_.ld + id;
      places_.push_back(place), before_.push_back(*place);
      *place = (*place > 0.0f ? *place / repetition : *place * repetition) - amounts.data()[i];
    }
  }

 private:
  Logits logits_;
  std::vector<float*> places_;
  std::vector<float> before_;
};

ChoiceRule rule_of(nb::handle from) {
  const nb::tuple parts = nb::borrow<nb::tuple>(from);
  return {nb::cast<float>(parts[0]), nb::cast<float>(parts[1]), nb::cast<int64_t>(parts[2]),
          nb::cast<float>(parts[3]), nb::cast<float>(parts[4])};
}

void choose_rows(Pool& pool, const Logits& logits, const std::vector<ChoiceRule>& rules, std::vector<int64_t>& ids) {
  const auto choose = kernels().choose;
  pool.run(logits.num_rows, [&](int64_t row, int) {
    static thread_local std::vector<float> scratch;
    const size_t size = static_cast<size_t>(choice_scratch(logits.num_tokens));
    if (scratch.size() < size) scratch.resize(size);
    const ChoiceRule rule = rules.empty() ? ChoiceRule{} : rules[static_cast<size_t>(row)];
    ids[static_cast<size_t>(row)] = choose(logits.x + row * logits.ld, logits.num_tokens, rule, scratch.data());
  });
}

nb::list choose(Pool& pool, uintptr_t x, int64_t ld, int64_t num_rows, int64_t num_tokens, nb::object rules,
                nb::object edits) {
  const Logits logits{reinterpret_cast<float*>(x), ld, num_rows, num_tokens};
  std::vector<ChoiceRule> all;
  if (!rules.is_none()) {
    for (nb::handle rule : rules) all.push_back(rule_of(rule));
    if (static_cast<int64_t>(all.size()) != num_rows) throw std::invalid_argument("choose: one rule for each row");
  }
  std::vector<int64_t> ids(static_cast<size_t>(num_rows));
  {
    Edited edited(logits);
    for (nb::handle edit : edits) edited.apply(edit);
    nb::gil_scoped_release released;
    choose_rows(pool, logits, all, ids);
  }
  nb::list found;
  for (const int64_t id : ids) found.append(id);
  return found;
}

}  // namespace

void bind_sample(nb::module_& m) {
  m.def("choose", choose, nb::arg("pool"), nb::arg("x"), nb::arg("ld"), nb::arg("num_rows"), nb::arg("num_tokens"),
        nb::arg("rules").none(), nb::arg("edits"));
}

}  // namespace mxn
