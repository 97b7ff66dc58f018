// A tile of transpose: 8 x 8 elements are exchanged in registers, by three rounds of interleaving.

#include "simd.h"

constexpr int kSide = 8;
typedef uint16_t Eight __attribute__((vector_size(2 * kSide)));

void exchange(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride, int64_t rows,
              int64_t columns) {
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t j = 0; j < whole_columns; j += kSide) {
    for (int64_t i = 0; i < whole_rows; i += kSide) {
      Eight x[kSide];
      for (int r = 0; r < kSide; ++r) x[r] = load<Eight>(from + (i + r) * from_stride + j);
      transpose(x);
      for (int r = 0; r < kSide; ++r) store(to + (j + r) * to_stride + i, x[r]);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i)
      to[j * to_stride + i] = from[i * from_stride + j];
  }
}

const Kernels kernels{exchange};
