// The CPU kernel of syncmask::mine_semi_hard; kernels/mine_semi_hard.py has the definition and the schema.
//
// A block of anchors meets the candidates in runs that stay in a core's second cache, tile by tile; no more than a
// tile of similarities exists for each thread. Each anchor keeps its best k so far in order, the worst of which is its
// floor. A sieve over the tile, a few instructions a vector, drops what does not rise above the floor or is too
// similar; ids are compared for the rest only. For draws the sieve bounds the noise from above by a hash, without a
// logarithm. Candidates come in ascending order and must beat what is there, so that ties go to the lowest index.
//
// Letters: N anchors, M candidates, D features.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "strided.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

constexpr int64_t kBlockBytes = 4 << 20;  // packed anchors of a block, and their winners
constexpr int64_t kRunBytes = 1 << 19;    // packed candidates of a run: half of the smallest second cache of a server
// A thread is woken for about 0.1 ms of work.
constexpr int64_t kMinMultipliesPerThread = 1 << 22;
constexpr int64_t kMinPanelsPerThread = 4;  // of anchors; with fewer, threads share out the candidates instead

// A vector of int64 with any stride.
struct Ids {
  const int64_t* data;
  int64_t stride;

  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

struct Args {
  Matrix anchors, candidates;
  Ids anchor_ids, candidate_ids;
  const float* positive_score;
  int64_t positive_stride;
  int64_t k;  // at most M
  float margin;
  bool draws;
  float temperature, inverse_temperature;
  uint32_t seed_key;
};

// Anchors first .. first + count - 1 against some of the candidates. Vectors over anchors are filled up to whole
// panels with anchors that nothing is eligible for.
struct Block {
  Block(const Args& args, const float* anchors, int64_t first, int64_t count);
  void search_candidates(int64_t begin, int64_t end);
  // The best so far of an anchor, descending; scores and indices (bits of int32) follow at `row_size` and twice that.
  // Empty places rank -inf.
  float* ranks_of(int64_t row) { return winners.data() + 3 * row_size * row; }

  const Args& args;
  const float* anchors;  // packed
  int64_t first, count;
  int64_t run = 0;                   // the first of the candidates that are packed now
  int64_t row_size;                  // k, filled up to whole vectors
  AlignedBuffer<float> winners;      // [count, 3, row_size]
  std::vector<float> limit;          // scores must be below
  std::vector<float> floor;          // ranks must be above, as the sieve computes them; NaN while any will do
  std::vector<uint32_t> row_key;     // hashes of the anchors
  std::vector<uint32_t> column_key;  // hashes of the candidates of a run
};

constexpr float kLowest = std::numeric_limits<float>::lowest(), kInfinity = std::numeric_limits<float>::infinity();

float noise(uint32_t hash) {
  const float u = std::min((static_cast<float>(hash) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -std::log(-std::log1p(-u));
}

struct Kernels {
  void (*pack)(const Matrix& from, int64_t first, int64_t count, int64_t size, float* buffer, float* to);
  void (*search)(Block& block, const float* candidates, int64_t count);
  void (*insert)(Block& block, int64_t row, float rank, float score, int32_t index);
  int64_t rows, width, lanes;  // anchors and candidates of a tile, floats of a vector
};

}  // namespace

#define SYNCMASK_KERNEL "mine_semi_hard_kernel.inl"
#include "isa.h"

namespace {

int32_t int_of(float bits) {
  int32_t x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t round_up(int64_t count, int64_t size) { return parts_of(count, size) * size; }

Block::Block(const Args& args, const float* anchors, int64_t first, int64_t count)
    : args(args), anchors(anchors), first(first), count(count), row_size(round_up(args.k, kernels().lanes)) {
  const int64_t padded = round_up(count, kernels().rows);
  limit.resize(padded, -kInfinity);
  floor.resize(padded, std::numeric_limits<float>::quiet_NaN());
  row_key.resize(padded);
  winners.resize(count * 3 * row_size);
  std::fill_n(winners.data(), count * 3 * row_size, -kInfinity);
  for (int64_t i = 0; i < count; ++i) {
    limit[i] = args.positive_score[(first + i) * args.positive_stride] - args.margin;
    row_key[i] = generic::mix(static_cast<uint32_t>(first + i) ^ args.seed_key);
  }
}

void Block::search_candidates(int64_t begin, int64_t end) {
  const int64_t columns = args.candidates.columns;
  const int64_t fitting = kRunBytes / static_cast<int64_t>(sizeof(float) * std::max<int64_t>(columns, 1));
  const int64_t size =
      std::min(round_up(std::max<int64_t>(fitting, 1), kernels().width), round_up(end - begin, kernels().width));
  AlignedBuffer<float> packed, rows;
  packed.resize(size * columns);
  rows.resize(kernels().lanes * columns);
  if (args.draws) column_key.resize(size);
  for (run = begin; run < end; run += size) {
    const int64_t length = std::min(size, end - run);
    kernels().pack(args.candidates, run, length, kernels().width, rows.data(), packed.data());
    for (int64_t j = 0; j < static_cast<int64_t>(column_key.size()); ++j) {
      column_key[j] = generic::mix(static_cast<uint32_t>(run + j) ^ 0x85ebca6bu);
    }
    kernels().search(*this, packed.data(), length);
  }
}

// Writes the rows of the results from the winners of blocks of the same anchors and ascending candidates.
void finish(std::vector<Block>& blocks, int64_t k, int64_t* index, float* score) {
  Block& all = blocks[0];
  const int64_t kept = all.args.k;
  for (int64_t row = 0; row < all.count; ++row, index += k, score += k) {
    float *ranks = all.ranks_of(row), *scores = ranks + all.row_size, *indices = scores + all.row_size;
    for (size_t i = 1; i < blocks.size(); ++i) {
      const float* other = blocks[i].ranks_of(row);
      for (int64_t place = 0; place < kept && other[place] > ranks[kept - 1]; ++place) {
        kernels().insert(all, row, other[place], other[all.row_size + place], int_of(other[2 * all.row_size + place]));
      }
    }
    for (int64_t place = 0; place < k; ++place) {
      const bool is_found = place < kept && ranks[place] >= kLowest;
      index[place] = is_found ? int_of(indices[place]) : -1;
      score[place] = is_found ? scores[place] : -kInfinity;
    }
  }
}

// Anchors first .. first + count - 1 against all candidates, which up to `threads` threads share out.
void mine_block(const Args& args, int64_t first, int64_t count, int64_t threads, int64_t k, int64_t* index,
                float* score) {
  AlignedBuffer<float> anchors, rows;
  anchors.resize(round_up(count, kernels().rows) * args.anchors.columns + kernels().lanes);
  rows.resize(kernels().lanes * args.anchors.columns);
  kernels().pack(args.anchors, first, count, kernels().rows, rows.data(), anchors.data());
  const int64_t candidates = args.candidates.rows, share = round_up(parts_of(candidates, threads), kernels().width);
  std::vector<Block> blocks;
  blocks.reserve(parts_of(candidates, share));
  for (int64_t begin = 0; begin < candidates; begin += share) blocks.emplace_back(args, anchors.data(), first, count);
  const auto search = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) blocks[i].search_candidates(i * share, std::min(candidates, (i + 1) * share));
  };
  if (blocks.size() == 1) {
    search(0, 1);
  } else {
    torch::stable::parallel_for(0, blocks.size(), 1, search);
  }
  finish(blocks, k, index + first * k, score + first * k);
}

void mine(const Args& args, int64_t k, int64_t* index, float* score) {
  const int64_t rows = args.anchors.rows, columns = args.anchors.columns;
  const int64_t row_bytes = sizeof(float) * (columns + 3 * args.k);
  const int64_t largest = std::max<int64_t>(kBlockBytes / row_bytes / kernels().rows, 1) * kernels().rows;
  const double work = static_cast<double>(rows) * args.candidates.rows * columns;
  const int64_t threads = std::clamp<int64_t>(work / kMinMultipliesPerThread, 1, torch::stable::get_num_threads());
  if (parts_of(rows, kernels().rows) < kMinPanelsPerThread * threads) {
    for (int64_t i = 0; i < rows; i += largest)
      mine_block(args, i, std::min(largest, rows - i), threads, k, index, score);
    return;
  }
  const int64_t blocks = round_up(parts_of(rows, largest), threads);
  const int64_t size = round_up(parts_of(rows, blocks), kernels().rows);
  torch::stable::parallel_for(0, parts_of(rows, size), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      mine_block(args, i * size, std::min(size, rows - i * size), 1, k, index, score);
    }
  });
}

Matrix matrix_of(const Tensor& x) {
  return {x.const_data_ptr(), x.scalar_type(), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

Ids ids_of(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == count && x.scalar_type() == ScalarType::Long,
                  "mine_semi_hard: ids must be int64 [N] and [M]");
  return {static_cast<const int64_t*>(x.const_data_ptr()), x.stride(0)};
}

std::tuple<Tensor, Tensor> mine_semi_hard(Tensor anchors, Tensor candidates, Tensor anchor_ids, Tensor candidate_ids,
                                          Tensor positive_score, int64_t k, double margin,
                                          std::optional<double> temperature, int64_t seed) {
  const ScalarType type = anchors.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "mine_semi_hard: anchors must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(anchors.dim() == 2 && candidates.dim() == 2 && anchors.size(1) == candidates.size(1) &&
                      candidates.scalar_type() == type,
                  "mine_semi_hard: anchors and candidates must be [N, D] and [M, D] of one dtype");
  STD_TORCH_CHECK(positive_score.dim() == 1 && positive_score.size(0) == anchors.size(0) &&
                      positive_score.scalar_type() == ScalarType::Float,
                  "mine_semi_hard: positive_score must be float32 [N]");
  STD_TORCH_CHECK(k >= 1 && (!temperature.has_value() || *temperature > 0),
                  "mine_semi_hard: k and temperature must be above 0");
  STD_TORCH_CHECK(std::max(anchors.size(0), candidates.size(0)) <= std::numeric_limits<int32_t>::max(),
                  "mine_semi_hard: more than 2^31 anchors or candidates");

  Args args;
  args.anchors = matrix_of(anchors);
  args.candidates = matrix_of(candidates);
  args.anchor_ids = ids_of(anchor_ids, anchors.size(0));
  args.candidate_ids = ids_of(candidate_ids, candidates.size(0));
  args.positive_score = static_cast<const float*>(positive_score.const_data_ptr());
  args.positive_stride = positive_score.stride(0);
  args.k = std::min(k, candidates.size(0));
  args.margin = static_cast<float>(margin);
  args.draws = temperature.has_value();
  args.temperature = static_cast<float>(temperature.value_or(1));
  args.inverse_temperature = 1 / args.temperature;
  const uint64_t bits = static_cast<uint64_t>(seed);
  args.seed_key =
      generic::mix(static_cast<uint32_t>(bits) ^ generic::mix(static_cast<uint32_t>(bits >> 32) ^ 0x9e3779b9u));

  Tensor index = torch::stable::new_empty(anchors, {anchors.size(0), k}, ScalarType::Long);
  Tensor score = torch::stable::new_empty(anchors, {anchors.size(0), k}, ScalarType::Float);
  int64_t* index_data = static_cast<int64_t*>(index.mutable_data_ptr());
  float* score_data = static_cast<float*>(score.mutable_data_ptr());
  if (args.k == 0) {
    std::fill_n(index_data, index.numel(), -1);
    std::fill_n(score_data, score.numel(), -kInfinity);
  } else {
    mine(args, k, index_data, score_data);
  }
  return {index, score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) { m.impl("mine_semi_hard", TORCH_BOX(&mine_semi_hard)); }
