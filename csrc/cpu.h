// Which instruction sets this processor has. ATEN_CPU_CAPABILITY=avx2 or default limits the choice, as it does
// torch's own: for tests, and for comparing.

#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SYNCMASK_HAS_X86 1
#endif

namespace syncmask {

enum class Isa { kPlain, kAvx2, kAvx512 };

inline Isa widest_isa() {
  Isa widest = Isa::kPlain;
#ifdef SYNCMASK_HAS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    widest = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
                 ? Isa::kAvx512
                 : Isa::kAvx2;
  }
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit != nullptr && std::strcmp(limit, "default") == 0) return Isa::kPlain;
  if (limit != nullptr && std::strcmp(limit, "avx2") == 0 && widest == Isa::kAvx512) return Isa::kAvx2;
#endif
  return widest;
}

}  // namespace syncmask
