// The CPU kernel of syncmask::transpose, which kernels/transpose.py defines: a bfloat16 matrix with its rows and columns exchanged.
//
// A product of a transposed matrix takes oneDNN twice the time of a plain one, and PyTorch's own copy of a transposed matrix as long
// again. Here 8 x 8 elements are exchanged in registers, by three rounds of interleaving.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

constexpr int kSide = 8;           // of what is exchanged in registers
constexpr int64_t kRows = 32, kColumns = 64;  // of what stays in the first cache meanwhile
typedef uint16_t Eight __attribute__((vector_size(16)));

inline void interleave(Eight a, Eight b, Eight& low, Eight& high) {
#ifdef __clang__
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shuffle(a, b, Eight{0, 8, 1, 9, 2, 10, 3, 11});
  high = __builtin_shuffle(a, b, Eight{4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

// to[j][i] = from[i][j] for 8 x 8 elements.
inline void exchange(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
  Eight x[kSide];
  for (int i = 0; i < kSide; ++i) std::memcpy(&x[i], from + i * from_stride, sizeof x[i]);
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    Eight y[kSide];
#pragma GCC unroll 4
    for (int i = 0; i < kSide / 2; ++i) interleave(x[i], x[i + kSide / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 8
    for (int i = 0; i < kSide; ++i) x[i] = y[i];
  }
  for (int i = 0; i < kSide; ++i) std::memcpy(to + i * to_stride, &x[i], sizeof x[i]);
}

void exchange_block(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t j = 0; j < whole_columns; j += kSide) {
    for (int64_t i = 0; i < whole_rows; i += kSide) exchange(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

Tensor transpose(Tensor x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.is_contiguous(), "transpose: x must be a contiguous bfloat16 matrix");
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = torch::stable::new_empty(x, {columns, rows});
  const uint16_t* from = static_cast<const uint16_t*>(x.const_data_ptr());
  uint16_t* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kRows; i < std::min(rows, last * kRows); i += kRows) {
      for (int64_t j = 0; j < columns; j += kColumns) {
        exchange_block(from + i * columns + j, columns, to + j * rows + i, rows, std::min(kRows, rows - i), std::min(kColumns, columns - j));
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) {
  m.impl("transpose", TORCH_BOX(&transpose));
}
