// The CPU kernel of syncmask::transpose, which kernels/transpose.py defines: a bfloat16 matrix with its rows and
// columns exchanged.
//
// A product of a transposed matrix takes oneDNN twice the time of a plain one, and PyTorch's own copy of a transposed
// matrix as long again.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "strided.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

constexpr int64_t kRows = 32, kColumns = 64;  // of a tile, which stays in the first cache

struct Kernels {
  // to[j][i] = from[i][j] for a tile.
  void (*exchange)(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride, int64_t rows,
                   int64_t columns);
};

}  // namespace

#define SYNCMASK_KERNEL "transpose_kernel.inl"
#include "isa.h"

namespace {

Tensor transpose(Tensor x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.is_contiguous(),
                  "transpose: x must be a contiguous bfloat16 matrix");
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = torch::stable::new_empty(x, {columns, rows});
  const uint16_t* from = static_cast<const uint16_t*>(x.const_data_ptr());
  uint16_t* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kRows; i < std::min(rows, last * kRows); i += kRows) {
      for (int64_t j = 0; j < columns; j += kColumns) {
        kernels().exchange(from + i * columns + j, columns, to + j * rows + i, rows, std::min(kRows, rows - i),
                           std::min(kColumns, columns - j));
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) { m.impl("transpose", TORCH_BOX(&transpose)); }
