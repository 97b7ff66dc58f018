// Matrices of any strides and dtype as the operators read them, and aligned memory for their scratch.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

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

// Memory that starts at a cache line: a vector that straddles two lines costs two accesses. Its contents are not set.
template <typename T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t count) { resize(count); }

  // Keeps memory that is large enough, and what is in it.
  void resize(int64_t count) {
    if (data_ != nullptr && count <= capacity_) return;
    const size_t bytes = (count * sizeof(T) / kLine + 1) * kLine;
    data_.reset();  // first, so that old and new memory do not add up
    data_.reset(static_cast<T*>(std::aligned_alloc(kLine, bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
    capacity_ = count;
  }
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr size_t kLine = 64;
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace syncmask
