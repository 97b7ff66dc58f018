// Matrices of any strides and dtype as the operators read them, and memory for their scratch.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace syncmask {

using torch::headeronly::ScalarType;

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// [rows, columns] elements; strides in elements.
struct Matrix {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;
};

inline int64_t element_size(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

// Floats from a multiple of 64 bytes on: a vector that straddles two cache lines costs two accesses.
class Floats {
 public:
  void resize(int64_t count) { floats_.resize(count + kCacheLine); }
  float* data() {
    const uintptr_t bytes = kCacheLine * sizeof(float), address = reinterpret_cast<uintptr_t>(floats_.data());
    return reinterpret_cast<float*>((address + bytes - 1) / bytes * bytes);
  }

 private:
  static constexpr int64_t kCacheLine = 16;
  std::vector<float> floats_;
};

}  // namespace syncmask
