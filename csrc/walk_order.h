// The order in which the walk of group_semi_hard prefers items, as integers; for C++ and CUDA.
//
// With `ordered` a monotone map of floats to 32-bit integers, key = ordered(similarity) - ordered(threshold) as an
// unsigned integer wraps: it is above all others for near misses (similarity < threshold), and rises with the
// similarity on either side. So one comparison covers the first two levels of the walk. Ties go to the lowest place.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SYNCMASK_HOST_DEVICE __host__ __device__
#else
#define SYNCMASK_HOST_DEVICE
#endif

namespace syncmask {

// NaN counts as -inf, and -0 is 0.
SYNCMASK_HOST_DEVICE inline int32_t ordered(float x) {
  x = x == x ? x + 0.0f : -__builtin_inff();
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

SYNCMASK_HOST_DEVICE inline int32_t ordered_threshold(float own, float margin) {
  return ordered((own == own ? own : -__builtin_inff()) - margin);
}

SYNCMASK_HOST_DEVICE inline uint32_t key_of(int32_t similarity, int32_t threshold) {
  return static_cast<uint32_t>(similarity) - static_cast<uint32_t>(threshold);
}

// A threshold below all: keys then follow the similarity only.
constexpr int32_t kNoThreshold = INT32_MIN;

// Higher is better; never 0. place: below 2^31.
SYNCMASK_HOST_DEVICE inline uint64_t entry_of(uint32_t key, int64_t place) {
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(place));
}

SYNCMASK_HOST_DEVICE inline int64_t place_of(uint64_t entry) { return 0xffffffffu - static_cast<uint32_t>(entry); }

}  // namespace syncmask
