// Which level runs: asked of the processor once, overridable by TRAK_EXT_CPU_LEVEL.
#if defined(TRAK_EXT_X86_LEVELS)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel_table.h"

namespace trak_ext::cpu {
namespace {

constexpr int kMaxLevels = 3;

struct LevelList {
  const KernelTable* table[kMaxLevels];
  const char* name[kMaxLevels + 1];
  int count;
};

#if defined(TRAK_EXT_X86_LEVELS)
// Not every compiler's __builtin_cpu_supports knows f16c.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

LevelList detect_levels() {
  LevelList levels = {};
  auto add = [&levels](const KernelTable& table) {
    levels.name[levels.count] = table.name;
    levels.table[levels.count++] = &table;
  };
  add(kBaselineKernels);
#if defined(TRAK_EXT_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2) add(kAvx2Kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    add(kAvx512Kernels);
  }
#endif
  return levels;
}

const LevelList& levels() {
  static const LevelList list = detect_levels();
  return list;
}

const KernelTable& choose_level() {
  const char* wanted = std::getenv("TRAK_EXT_CPU_LEVEL");
  if (!wanted || !*wanted) return *levels().table[levels().count - 1];
  std::string known;
  for (int i = 0; i < levels().count; ++i) {
    if (levels().name[i] == std::string(wanted)) return *levels().table[i];
    known += (i ? ", " : "") + std::string(levels().name[i]);
  }
  throw std::invalid_argument("TRAK_EXT_CPU_LEVEL: expected a level that this machine runs (" +
                              known + "), got '" + wanted + "'");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose_level();  // a throw leaves it to be tried again
  return chosen;
}

bool has_fixed_point() {
#if defined(TRAK_EXT_X86_LEVELS)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  return &kernels() == &kAvx512Kernels && has_vnni;
#else
  return false;
#endif
}

const ProjectionKernels& projection_kernels(Kind kind, [[maybe_unused]] Precision precision) {
  if (kind == Kind::kNormal) return kernels().normal;
#if defined(TRAK_EXT_X86_LEVELS)
  if (precision == Precision::kMedium && has_fixed_point()) return kVnniMediumKernels;
#endif
  return kernels().rademacher;
}

const char* const* available_levels() { return levels().name; }

}  // namespace trak_ext::cpu
