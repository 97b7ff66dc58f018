// One build for every x86-64 processor. Where SYNCMASK_KERNEL is defined (a file name), compiles that file once for
// each instruction set, in the namespaces avx512, avx2 and generic, and defines kernels(), which returns those in use.
//
// Include it once in a source file, outside all namespaces, after `struct Kernels` in an anonymous namespace. The file
// sees SYNCMASK_LANES, the floats in a vector, and ends with `const Kernels kernels{...};`.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SYNCMASK_HAS_X86 1
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace syncmask {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa isa();  // in use; isa.cpp

}  // namespace syncmask

#ifdef SYNCMASK_KERNEL

namespace {

#ifdef SYNCMASK_HAS_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace avx512 {
#define SYNCMASK_LANES 16
#include SYNCMASK_KERNEL
#undef SYNCMASK_LANES
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define SYNCMASK_LANES 8
#include SYNCMASK_KERNEL
#undef SYNCMASK_LANES
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace generic {
#define SYNCMASK_LANES 4
#include SYNCMASK_KERNEL
#undef SYNCMASK_LANES
}  // namespace generic

inline const Kernels& kernels() {
#ifdef SYNCMASK_HAS_X86
  switch (syncmask::isa()) {
    case syncmask::Isa::kAvx512:
      return avx512::kernels;
    case syncmask::Isa::kAvx2:
      return avx2::kernels;
    case syncmask::Isa::kGeneric:
      break;
  }
#endif
  return generic::kernels;
}

}  // namespace

#endif  // SYNCMASK_KERNEL
