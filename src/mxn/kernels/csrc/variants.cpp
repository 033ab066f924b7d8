#include "variants.h"

#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mxn {

const Kernels& kernels_generic();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512vnni();
const Kernels& kernels_amx();
#if defined(MXN_WITH_EMULATED)
const Kernels& kernels_amx_emulated();
#endif
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
bool has_vnni();

// The system must allow a process to use the tiles' large state before it may.
bool has_amx() {
  uint32_t a, b, c, d;
  if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & (kTile | kInt8)) != (kTile | kInt8)) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool is_allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_allowed;
#else
  return false;
#endif
}

bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

const Kernels* current = nullptr;

}  // namespace

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all{
#if defined(__x86_64__)
      {"amx", kernels_amx, has_amx},
#if defined(MXN_WITH_EMULATED)
      {"amx_emulated", kernels_amx_emulated, has_vnni},
#endif
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
