// The instruction set in use, and the C functions that syncmask_fast/_native.py calls.
//
// At the start it is the widest that the processor has and ATEN_CPU_CAPABILITY (avx2 or default) allows, as in torch.

#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifndef SYNCMASK_BUILD_STAMP
#define SYNCMASK_BUILD_STAMP "unknown build"
#endif
#define SYNCMASK_EXPORT extern "C" __attribute__((visibility("default")))

namespace syncmask {
namespace {

Isa widest_isa() {
#ifdef SYNCMASK_HAS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return has_avx512 ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kGeneric;
#endif
}

Isa starting_isa() {
  const Isa widest = widest_isa();
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit != nullptr && std::strcmp(limit, "default") == 0) return Isa::kGeneric;
  if (limit != nullptr && std::strcmp(limit, "avx2") == 0 && widest == Isa::kAvx512) return Isa::kAvx2;
  return widest;
}

std::atomic<Isa> chosen{starting_isa()};

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace syncmask

using syncmask::Isa;

SYNCMASK_EXPORT const char* syncmask_build_stamp() { return SYNCMASK_BUILD_STAMP; }

// Names of the instruction sets that this processor has, the widest first.
SYNCMASK_EXPORT const char* syncmask_isas() {
  switch (syncmask::widest_isa()) {
    case Isa::kAvx512:
      return "avx512 avx2 generic";
    case Isa::kAvx2:
      return "avx2 generic";
    default:
      return "generic";
  }
}

SYNCMASK_EXPORT const char* syncmask_isa() { return syncmask::kNames[static_cast<int>(syncmask::isa())]; }

// Null chooses the widest. A name that is not among syncmask_isas() changes nothing.
SYNCMASK_EXPORT void syncmask_set_isa(const char* name) {
  const Isa widest = syncmask::widest_isa();
  if (name == nullptr) syncmask::chosen = widest;
  for (int i = 0; name != nullptr && i <= static_cast<int>(widest); ++i) {
    if (std::strcmp(name, syncmask::kNames[i]) == 0) syncmask::chosen = static_cast<Isa>(i);
  }
}
