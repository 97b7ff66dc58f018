// The CPU kernels of syncmask::packed_attention and its backward, which kernels/packed_attention.py defines and where
// their schemas are.
//
// The work is cut into one block of queries and keys and one head of it. Sequences are read and written where they lie,
// without padding and without a copy in another dtype; sums are in float32. No attention map outlives the 64 queries it
// is of.
//
// Letters: T queries and S keys of all blocks together, N blocks, H heads, D head width.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>

#include "strided.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

constexpr int64_t kChunk = 64;  // queries whose attention map exists at a time

// One block and head: q [rows, D], k and v [keys, D].
struct Task {
  Matrix q, k, v;
  float scale;
};

// Rows of a result, whose columns are next to each other.
struct Output {
  void* data;
  ScalarType type;
  int64_t columns, row_stride;
};

// What one thread works in; [.., width] has D filled up to whole vectors, [.., keys] the same.
struct Scratch {
  AlignedBuffer<float> rows;                     // [keys, width], of k or v
  AlignedBuffer<float> keys, values;             // [D, keys], transposed
  AlignedBuffer<float> queries, outputs, grads;  // [kChunk, width]
  AlignedBuffer<float> scores, grad_scores;      // [kChunk, keys]
  AlignedBuffer<float> grad_keys, grad_values;   // [keys, width]
};

struct Kernels {
  void (*forward)(const Task& task, Scratch& scratch, const Output& out, float* log_sums);
  void (*backward)(const Task& task, const Matrix& grad, const Matrix& out, const float* log_sums, Scratch& scratch,
                   const Output& grad_q, const Output& grad_k, const Output& grad_v);
};

}  // namespace

#define SYNCMASK_KERNEL "packed_attention_kernel.inl"
#include "isa.h"

namespace {

struct Args {
  const Tensor &q, &k, &v;
  const int32_t *q_starts, *k_starts;
  int64_t blocks, heads;
  float scale;
};

void check_starts(const char* name, const Tensor& starts, const Tensor& rows) {
  STD_TORCH_CHECK(
      starts.dim() == 1 && starts.size(0) >= 1 && starts.scalar_type() == ScalarType::Int && starts.is_contiguous(),
      "packed_attention: ", name, " must be contiguous int32 [N + 1]");
  const int32_t* start = static_cast<const int32_t*>(starts.const_data_ptr());
  const int64_t blocks = starts.size(0) - 1;
  bool rising = start[0] == 0 && start[blocks] == rows.size(0);
  for (int64_t n = 0; n < blocks; ++n) rising = rising && start[n] <= start[n + 1];
  STD_TORCH_CHECK(rising, "packed_attention: ", name, " must rise from 0 to the number of rows");
}

void check_features(const Tensor& x, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 3 && x.size(1) == q.size(1) && x.size(2) == q.size(2) && x.scalar_type() == q.scalar_type(),
      "packed_attention: ", name, " must be [rows, H, D] with the heads, width and dtype of q");
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) <= 1 || x.size(0) == 0, "packed_attention: the columns of ", name,
                  " must be next to each other");
}

Args checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_starts, const Tensor& k_starts,
             double scale) {
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16,
                  "packed_attention: q must be float32 or bfloat16");
  STD_TORCH_CHECK(q.dim() == 3, "packed_attention: q must be [T, H, D]");
  check_features(q, q, "q");
  check_features(k, q, "k");
  check_features(v, q, "v");
  STD_TORCH_CHECK(k.size(0) == v.size(0), "packed_attention: k and v must have the same rows");
  STD_TORCH_CHECK(q_starts.dim() == 1 && k_starts.dim() == 1 && q_starts.size(0) == k_starts.size(0),
                  "packed_attention: q_starts and k_starts must have the same blocks");
  check_starts("q_starts", q_starts, q);
  check_starts("k_starts", k_starts, k);
  return {q,
          k,
          v,
          static_cast<const int32_t*>(q_starts.const_data_ptr()),
          static_cast<const int32_t*>(k_starts.const_data_ptr()),
          q_starts.size(0) - 1,
          q.size(1),
          static_cast<float>(scale)};
}

// The rows of block n and head h.
Matrix matrix_of(const Tensor& x, const int32_t* starts, int64_t n, int64_t h) {
  Matrix matrix;
  matrix.type = x.scalar_type();
  const int64_t offset = starts[n] * x.stride(0) + h * x.stride(1);
  matrix.data = static_cast<const char*>(x.const_data_ptr()) + offset * element_size(matrix.type);
  matrix.rows = starts[n + 1] - starts[n];
  matrix.columns = x.size(2);
  matrix.row_stride = x.stride(0);
  matrix.column_stride = 1;
  return matrix;
}

Output output_of(Tensor& x, const int32_t* starts, int64_t n, int64_t h) {
  const int64_t offset = starts[n] * x.stride(0) + h * x.stride(1);
  void* data = static_cast<char*>(x.mutable_data_ptr()) + offset * element_size(x.scalar_type());
  return {data, x.scalar_type(), x.size(2), x.stride(0)};
}

Task task_of(const Args& args, int64_t n, int64_t h) {
  return {matrix_of(args.q, args.q_starts, n, h), matrix_of(args.k, args.k_starts, n, h),
          matrix_of(args.v, args.k_starts, n, h), args.scale};
}

// Calls run(block, head, scratch) for each; no two of them write the same rows.
template <typename Run>
void for_each_block(const Args& args, const Run& run) {
  torch::stable::parallel_for(0, args.blocks * args.heads, 1, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t i = first; i < last; ++i) run(i / args.heads, i % args.heads, scratch);
  });
}

std::tuple<Tensor, Tensor> packed_attention(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor k_starts,
                                            double scale) {
  const Args args = checked(q, k, v, q_starts, k_starts, scale);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor log_sums = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float);
  float* sums = static_cast<float*>(log_sums.mutable_data_ptr());
  const int64_t rows = q.size(0);
  for_each_block(args, [&](int64_t n, int64_t h, Scratch& scratch) {
    float* of_block = sums + h * rows + args.q_starts[n];
    kernels().forward(task_of(args, n, h), scratch, output_of(out, args.q_starts, n, h), of_block);
  });
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out,
                                                             Tensor log_sums, Tensor q_starts, Tensor k_starts,
                                                             double scale) {
  const Args args = checked(q, k, v, q_starts, k_starts, scale);
  check_features(grad, q, "grad");
  check_features(out, q, "out");
  STD_TORCH_CHECK(grad.size(0) == q.size(0) && out.size(0) == q.size(0),
                  "packed_attention: grad and out must have the rows of q");
  STD_TORCH_CHECK(log_sums.dim() == 2 && log_sums.size(0) == q.size(1) && log_sums.size(1) == q.size(0) &&
                      log_sums.is_contiguous() && log_sums.scalar_type() == ScalarType::Float,
                  "packed_attention: log_sums must be contiguous float32 [H, T]");
  Tensor grad_q = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  const float* sums = static_cast<const float*>(log_sums.const_data_ptr());
  const int64_t rows = q.size(0);
  for_each_block(args, [&](int64_t n, int64_t h, Scratch& scratch) {
    const float* of_block = sums + h * rows + args.q_starts[n];
    kernels().backward(task_of(args, n, h), matrix_of(grad, args.q_starts, n, h), matrix_of(out, args.q_starts, n, h),
                       of_block, scratch, output_of(grad_q, args.q_starts, n, h),
                       output_of(grad_k, args.k_starts, n, h), output_of(grad_v, args.k_starts, n, h));
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) {
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}
