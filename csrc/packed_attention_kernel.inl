// Attention of one block and head, forward and backward.
//
// Everything is a product a . b of one form: scalars of `a` (any strides, so that a transposed one costs nothing) times
// vectors along the rows of `b`, which are padded with zeros to whole vectors.

#include "simd.h"

constexpr int kVectors = kLanes == 16 ? 4 : 2, kRows = 6;  // of a tile of a product, whose sums fit the registers

INLINE int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// to[i][c] (= or +=) sum over t < terms of a(i, t) * b[t][c], for R rows and V vectors of columns.
template <int R, int V>
__attribute__((noinline)) void tile(Factor a, const float* b, int64_t b_stride, int64_t terms, bool add, float* to,
                                    int64_t to_stride) {
  Lanes sum[R][V];
  multiply<R, V>(a, b, b_stride, terms, sum);
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
      float* place = to + i * to_stride + v * kLanes;
      store(place, add ? load(place) + sum[i][v] : sum[i][v]);
    }
  }
}

template <int R, int V>
INLINE void tile_rows(Factor a, const float* b, int64_t b_stride, int64_t terms, bool add, float* to, int64_t to_stride,
                      int64_t rows) {
  for (; rows >= R; rows -= R) {
    tile<R, V>(a, b, b_stride, terms, add, to, to_stride);
    a.data += R * a.row;
    to += R * to_stride;
  }
  if constexpr (R > 1) tile_rows<R / 2, V>(a, b, b_stride, terms, add, to, to_stride, rows);
}

// For V vectors of columns at a time, then the rest with fewer.
template <int V>
INLINE void tile_columns(Factor a, const float* b, int64_t b_stride, int64_t terms, bool add, float* to,
                         int64_t to_stride, int64_t rows, int64_t vectors) {
  for (; vectors >= V; vectors -= V) {
    tile_rows<kRows, V>(a, b, b_stride, terms, add, to, to_stride, rows);
    b += V * kLanes;
    to += V * kLanes;
  }
  if constexpr (V > 1) tile_columns<V - 1>(a, b, b_stride, terms, add, to, to_stride, rows, vectors);
}

// to [rows, columns] (= or +=) a [rows, terms] . b [terms, columns]; columns: a multiple of kLanes.
void product(Factor a, const float* b, int64_t b_stride, int64_t terms, bool add, float* to, int64_t to_stride,
             int64_t rows, int64_t columns) {
  tile_columns<kVectors>(a, b, b_stride, terms, add, to, to_stride, rows, columns / kLanes);
}

template <typename T>
INLINE void read_as_float(const Matrix& from, int64_t first, int64_t rows, float* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const T* row = static_cast<const T*>(from.data) + (first + r) * from.row_stride;
    for (int64_t c = 0; c < from.columns; ++c) to[c] = to_float(row[c]);
    for (int64_t c = from.columns; c < stride; ++c) to[c] = 0;
  }
}

// Rows `first` to `first + rows` as float32, filled with zeros to `stride` columns.
INLINE void read_padded(const Matrix& from, int64_t first, int64_t rows, float* to, int64_t stride) {
  if (from.type == ScalarType::Float) read_as_float<float>(from, first, rows, to, stride);
  if (from.type == ScalarType::BFloat16) read_as_float<Bfloat16>(from, first, rows, to, stride);
}

// to [columns, padded(rows)] = from [rows, columns] transposed; `from` has padded(rows) rows.
INLINE void transpose_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    const float* row[kLanes];
    for (int l = 0; l < kLanes; ++l) row[l] = from + (first + l) * stride;
    interleave_rows(row, columns, padded(rows), to + first);
  }
}

INLINE void write(float x, float* to) { *to = x; }
INLINE void write(float x, Bfloat16* to) {  // to the nearest, the even one of two
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000;
  to->bits = static_cast<uint16_t>(bits >> 16);
}

template <typename T>
INLINE void write_as(const float* from, int64_t stride, const Output& to, int64_t first, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    T* row = static_cast<T*>(to.data) + (first + r) * to.row_stride;
    for (int64_t c = 0; c < to.columns; ++c) write(from[c], row + c);
  }
}

INLINE void write_rows(const float* from, int64_t stride, const Output& to, int64_t first, int64_t rows) {
  if (to.type == ScalarType::Float) write_as<float>(from, stride, to, first, rows);
  if (to.type == ScalarType::BFloat16) write_as<Bfloat16>(from, stride, to, first, rows);
}

// x with lane l where lane l ^ bit was.
template <int... l>
INLINE Lanes swapped(Lanes x, int bit, std::integer_sequence<int, l...>) {
#ifdef __clang__
  Lanes y;
  for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ bit];
  return y;
#else
  return __builtin_shuffle(x, Ints{l...} ^ bit);
#endif
}

INLINE Lanes swapped(Lanes x, int bit) { return swapped(x, bit, std::make_integer_sequence<int, kLanes>()); }

INLINE float sum_of(Lanes x) {
#pragma GCC unroll 4
  for (int bit = kLanes / 2; bit > 0; bit /= 2) x += swapped(x, bit);
  return x[0];
}

INLINE float highest_of(Lanes x) {
#pragma GCC unroll 4
  for (int bit = kLanes / 2; bit > 0; bit /= 2) x = higher(x, swapped(x, bit));
  return x[0];
}

// Keys or values of a block, as rows and transposed; rows has padded(count) rows.
INLINE void read_keys(const Matrix& from, AlignedBuffer<float>& rows, AlignedBuffer<float>* transposed) {
  const int64_t width = padded(from.columns), count = padded(from.rows);
  rows.resize(count * width);
  read_padded(from, 0, from.rows, rows.data(), width);
  std::fill(rows.data() + from.rows * width, rows.data() + count * width, 0.0f);
  if (transposed == nullptr) return;
  transposed->resize(from.columns * count);
  transpose_rows(rows.data(), width, from.rows, from.columns, transposed->data());
}

// Turns scores into exp(scale * (score - the highest)); returns their sum, and scale * the highest in *top.
INLINE float softmax_row(float* scores, int64_t keys, float scale, float* top) {
  const int64_t end = padded(keys);
  std::fill(scores + keys, scores + end, -std::numeric_limits<float>::max());
  Lanes highest = load(scores);
  for (int64_t j = kLanes; j < end; j += kLanes) highest = higher(load(scores + j), highest);
  const float best = highest_of(highest);
  Lanes sum = {};
  for (int64_t j = 0; j < end; j += kLanes) {
    const Lanes x = exp_of_negative((load(scores + j) - best) * scale);
    store(scores + j, x);
    sum += x;
  }
  *top = best * scale;
  return sum_of(sum);
}

void attend(const Task& task, Scratch& scratch, const Output& out, float* log_sums) {
  const int64_t keys = task.k.rows, columns = task.q.columns, width = padded(columns), row = padded(keys);
  read_keys(task.k, scratch.rows, &scratch.keys);
  read_keys(task.v, scratch.rows, nullptr);
  scratch.queries.resize(kChunk * width);
  scratch.scores.resize(kChunk * row);
  scratch.outputs.resize(kChunk * width);
  float *queries = scratch.queries.data(), *scores = scratch.scores.data(), *outputs = scratch.outputs.data();
  if (keys == 0) std::fill_n(outputs, kChunk * width, 0.0f);
  for (int64_t first = 0; first < task.q.rows; first += kChunk) {
    const int64_t count = std::min(kChunk, task.q.rows - first);
    if (keys > 0) {
      read_padded(task.q, first, count, queries, width);
      product({queries, width, 1}, scratch.keys.data(), row, columns, false, scores, row, count, row);
      float sums[kChunk];
      for (int64_t i = 0; i < count; ++i)
        sums[i] = softmax_row(scores + i * row, keys, task.scale, log_sums + first + i);
      product({scores, row, 1}, scratch.rows.data(), width, keys, false, outputs, width, count, width);
      for (int64_t i = 0; i < count; ++i) {
        const float share = 1 / sums[i];
        for (int64_t c = 0; c < width; ++c) outputs[i * width + c] *= share;
        log_sums[first + i] += std::log(sums[i]);
      }
    } else {
      std::fill_n(log_sums + first, count, -std::numeric_limits<float>::infinity());
    }
    write_rows(outputs, width, out, first, count);
  }
}

void attend_backward(const Task& task, const Matrix& grad, const Matrix& out, const float* log_sums, Scratch& scratch,
                     const Output& grad_q, const Output& grad_k, const Output& grad_v) {
  const int64_t keys = task.k.rows, columns = task.q.columns, width = padded(columns), row = padded(keys);
  read_keys(task.v, scratch.rows, &scratch.values);
  read_keys(task.k, scratch.rows, &scratch.keys);
  for (AlignedBuffer<float>* floats : {&scratch.queries, &scratch.outputs, &scratch.grads})
    floats->resize(kChunk * width);
  for (AlignedBuffer<float>* floats : {&scratch.scores, &scratch.grad_scores}) floats->resize(kChunk * row);
  for (AlignedBuffer<float>* floats : {&scratch.grad_keys, &scratch.grad_values}) {
    floats->resize(row * width);
    std::fill_n(floats->data(), row * width, 0.0f);
  }
  float *queries = scratch.queries.data(), *outputs = scratch.outputs.data(), *grads = scratch.grads.data();
  float *weights = scratch.scores.data(), *grad_scores = scratch.grad_scores.data();
  for (int64_t first = 0; first < task.q.rows; first += kChunk) {
    const int64_t count = std::min(kChunk, task.q.rows - first);
    read_padded(task.q, first, count, queries, width);
    read_padded(out, first, count, outputs, width);
    read_padded(grad, first, count, grads, width);
    product({queries, width, 1}, scratch.keys.data(), row, columns, false, weights, row, count, row);
    product({grads, width, 1}, scratch.values.data(), row, columns, false, grad_scores, row, count, row);
    for (int64_t i = 0; i < count; ++i) {
      Lanes sum = {};
      for (int64_t c = 0; c < width; c += kLanes) sum += load(grads + i * width + c) * load(outputs + i * width + c);
      const float mean = sum_of(sum), log_sum = log_sums[first + i];
      float *weight = weights + i * row, *grad_score = grad_scores + i * row;
      std::fill(weight + keys, weight + row, -std::numeric_limits<float>::max());
      for (int64_t j = 0; j < row; j += kLanes) {
        const Lanes x = exp_of_negative(load(weight + j) * task.scale - log_sum);
        store(weight + j, x);
        store(grad_score + j, x * (load(grad_score + j) - mean) * task.scale);
      }
    }
    product({weights, 1, row}, grads, width, count, true, scratch.grad_values.data(), width, keys, width);
    product({grad_scores, 1, row}, queries, width, count, true, scratch.grad_keys.data(), width, keys, width);
    product({grad_scores, row, 1}, scratch.rows.data(), width, keys, false, outputs, width, count, width);
    write_rows(outputs, width, grad_q, first, count);
  }
  write_rows(scratch.grad_keys.data(), width, grad_k, 0, keys);
  write_rows(scratch.grad_values.data(), width, grad_v, 0, keys);
}

const Kernels kernels{attend, attend_backward};
