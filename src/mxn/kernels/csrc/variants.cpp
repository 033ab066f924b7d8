#include "variants.h"

#include <stdexcept>

namespace mxn {

const Kernels& kernels_generic();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512vnni();
#endif

namespace {

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

const Kernels* current = nullptr;

}  // namespace

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all{
#if defined(__x86_64__)
      {"avx512vnni", kernels_avx512vnni, has_vnni},
      {"avx512", kernels_avx512, has_avx512},
      {"avx2", kernels_avx2, has_avx2},
#endif
      {"generic", kernels_generic, always},
  };
  return all;
}

void use_variant(const std::string& name) {
  std::string usable;
  for (const Variant& v : variants()) {
    if (!v.is_usable()) continue;
    if (name.empty() || name == v.name) {
      current = &v.kernels();
      return;
    }
    usable += (usable.empty() ? "" : ", ") + std::string(v.name);
  }
  throw std::invalid_argument("MXN_ISA='" + name + "' cannot be used on this processor; usable: " + usable);
}

const Kernels& kernels() {
  if (!current) use_variant("");
  return *current;
}

}  // namespace mxn
