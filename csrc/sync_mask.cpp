// The CPU kernel of syncmask::sync_mask, which kernels/sync_mask.py defines and where its schema is.
//
// The work is cut into parts: one sample, one head and up to 64 of its words. Only the words that count are
// computed. A part's attention weights are the scratch of a thread, and what leaves it is one score a word and
// one a patch. Parts are summed over heads in one order, whatever the number of threads.
//
// Letters: B samples, H heads, T tokens, P patches, D head width.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu.h"
#include "matrix.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

constexpr int64_t kMaxLanes = 16;

enum class TokenRule { kPeak, kMass, kCls, kOutput };
enum class PatchRule { kMean, kCls, kWeighted, kMax };

struct Part {
  Matrix q, k, v;
  const int32_t* words;  // rows of q
  int64_t count;
  float scale;
  TokenRule token_rule;
  PatchRule patch_rule;  // kCls takes the first word of the part
};

// What one thread works in.
struct Scratch {
  Floats queries;              // [D, width]
  Floats weights;              // [1+P and up to a vector more, width]
  Floats rows;                 // some rows of q or k in float32, where they are not already
  Floats values;               // [1+P, D], likewise
  Floats outputs;              // [D, width]
  Floats part;                 // [width + P and up to a vector more]
  std::vector<float> head;     // [P]
  std::vector<int32_t> words;  // [T]
  std::vector<uint64_t> keys;  // [max(T, P)]
};

// One build for every x86-64 processor: three instruction sets, picked at run time.
#ifdef SYNCMASK_HAS_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace avx512 {
#define SYNCMASK_LANES 16
#define SYNCMASK_VECTORS 4
#define SYNCMASK_SUMS 24
#include "sync_mask_part.h"
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define SYNCMASK_LANES 8
#define SYNCMASK_VECTORS 3
#define SYNCMASK_SUMS 12
#include "sync_mask_part.h"
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace plain {
#define SYNCMASK_LANES 4
#define SYNCMASK_VECTORS 2
#define SYNCMASK_SUMS 8
#include "sync_mask_part.h"
}  // namespace plain

struct Runner {
  decltype(&plain::run_part) run = plain::run_part;
  int64_t width = plain::kLanes * plain::kVectors;  // words of a part
  int64_t rows = plain::kSums;                      // rows converted at a time, at least one for each lane
};

Runner widest_runner() {
#ifdef SYNCMASK_HAS_X86
  switch (widest_isa()) {
    case Isa::kAvx512:
      return {avx512::run_part, avx512::kLanes * avx512::kVectors, avx512::kSums};
    case Isa::kAvx2:
      return {avx2::run_part, avx2::kLanes * avx2::kVectors, avx2::kSums};
    case Isa::kPlain:
      break;
  }
#endif
  return {};
}

const Runner runner = widest_runner();

struct Problem {
  Tensor q, k, maskable;
  std::optional<Tensor> v;
  double token_ratio, patch_ratio;
  float scale;
  TokenRule token_rule;
  PatchRule patch_rule;
  int64_t batch, heads, tokens, patches, columns;
  const bool* maskable_data;
  bool* token_mask;
  bool* patch_mask;
  float* token_score;
  float* patch_score;

  bool is_maskable(int64_t b, int64_t i) const {
    return maskable_data[b * maskable.stride(0) + i * maskable.stride(1)];
  }
  int64_t part_size() const { return runner.width + patches + kMaxLanes; }
};

Matrix matrix_of(const Tensor& x, int64_t b, int64_t h) {
  Matrix matrix;
  matrix.type = x.scalar_type();
  const int64_t offset = (b * x.stride(0) + h * x.stride(1)) * element_size(matrix.type);
  matrix.data = static_cast<const char*>(x.const_data_ptr()) + offset;
  matrix.rows = x.size(2);
  matrix.columns = x.size(3);
  matrix.row_stride = x.stride(2);
  matrix.column_stride = x.stride(3);
  return matrix;
}

Scratch make_scratch(const Problem& problem) {
  Scratch scratch;
  const int64_t keys = 1 + problem.patches, columns = problem.columns;
  scratch.queries.resize(columns * runner.width);
  scratch.weights.resize((keys + kMaxLanes) * runner.width);
  scratch.rows.resize(runner.rows * columns);
  if (problem.token_rule == TokenRule::kOutput) {
    scratch.values.resize(keys * columns);
    scratch.outputs.resize(columns * runner.width);
  }
  scratch.part.resize(problem.part_size());
  scratch.head.resize(problem.patches);
  return scratch;
}

// The rule and the words of a sample: its maskable tokens, and where the rule is "cls" token 0 before them. A
// sample without a maskable token has the rule "cls".
PatchRule choose_words(const Problem& problem, int64_t b, std::vector<int32_t>& words) {
  words.clear();
  for (int64_t i = 0; i < problem.tokens; ++i) {
    const bool is_first = i == 0 && problem.patch_rule == PatchRule::kCls;
    if (is_first || problem.is_maskable(b, i)) words.push_back(i);
  }
  if (!words.empty()) return problem.patch_rule;
  words.push_back(0);
  return PatchRule::kCls;
}

// part[0, width): a score of each word; part[width, width + P): a score of each patch.
void run_part(const Problem& problem, int64_t b, int64_t h, int64_t begin, const std::vector<int32_t>& words,
              PatchRule rule, Scratch& scratch, float* part) {
  Part task;
  task.q = matrix_of(problem.q, b, h);
  task.k = matrix_of(problem.k, b, h);
  if (problem.token_rule == TokenRule::kOutput) task.v = matrix_of(*problem.v, b, h);
  task.words = words.data() + begin;
  task.count = std::min<int64_t>(runner.width, words.size() - begin);
  task.scale = problem.scale;
  task.token_rule = problem.token_rule;
  task.patch_rule = rule;
  runner.run(task, scratch, part, part + runner.width);
}

// Orders scores from the highest to the lowest, NaN last, the lowest index first among equals.
uint64_t sort_key(float score, int64_t index) {
  uint32_t bits = std::numeric_limits<uint32_t>::max();
  if (score == score) {
    score += 0.0f;  // -0 is 0
    std::memcpy(&bits, &score, sizeof bits);
    bits = bits >> 31 ? bits : ~bits & 0x7fffffffu;
  }
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(index);
}

void mark_highest(std::vector<uint64_t>& keys, int64_t count, bool* mask) {
  if (count < static_cast<int64_t>(keys.size())) {
    std::nth_element(keys.begin(), keys.begin() + count, keys.end());
  }
  for (int64_t i = 0; i < count; ++i) mask[keys[i] & 0xffffffffu] = true;
}

int64_t share_of(double ratio, int64_t count) {
  if (ratio == 0 || count == 0) return 0;
  return std::min(count, std::max<int64_t>(1, static_cast<int64_t>(ratio * count + 0.5)));
}

// Sums parts, which part_of(h, begin) gives, over heads and writes what the operator returns of sample b.
template <typename PartOf>
void finish_sample(const Problem& problem, int64_t b, const std::vector<int32_t>& words, PatchRule rule,
                   Scratch& scratch, const PartOf& part_of) {
  const int64_t patches = problem.patches, count = words.size();
  float* token_score = problem.token_score + b * problem.tokens;
  float* patch_score = problem.patch_score + b * patches;
  std::fill_n(token_score, problem.tokens, 0.0f);
  std::fill_n(patch_score, patches, 0.0f);
  float* head = scratch.head.data();
  for (int64_t h = 0; h < problem.heads; ++h) {
    for (int64_t begin = 0; begin < count; begin += runner.width) {
      const float* token = part_of(h, begin);
      const float* patch = token + runner.width;
      const int64_t end = std::min(count, begin + runner.width);
      for (int64_t i = begin; i < end; ++i) token_score[words[i]] += token[i - begin];
      if (begin == 0) {
        std::copy_n(patch, patches, head);
      } else if (rule == PatchRule::kMax) {
        for (int64_t j = 0; j < patches; ++j) head[j] = head[j] >= patch[j] || head[j] != head[j] ? head[j] : patch[j];
      } else if (rule != PatchRule::kCls) {
        for (int64_t j = 0; j < patches; ++j) head[j] += patch[j];
      }
    }
    const bool is_mean = rule == PatchRule::kMean || rule == PatchRule::kWeighted;
    const float divisor = is_mean ? count : 1;
    for (int64_t j = 0; j < patches; ++j) patch_score[j] += head[j] / divisor;
  }
  const float heads = problem.heads;
  std::vector<uint64_t>& keys = scratch.keys;
  keys.clear();
  for (int64_t i = 0; i < problem.tokens; ++i) {
    const bool is_maskable = problem.is_maskable(b, i);
    token_score[i] = is_maskable ? token_score[i] / heads : -std::numeric_limits<float>::infinity();
    if (is_maskable) keys.push_back(sort_key(token_score[i], i));
  }
  bool* token_mask = problem.token_mask + b * problem.tokens;
  std::fill_n(token_mask, problem.tokens, false);
  mark_highest(keys, share_of(problem.token_ratio, keys.size()), token_mask);

  for (int64_t j = 0; j < patches; ++j) patch_score[j] /= heads;
  bool* patch_mask = problem.patch_mask + b * patches;
  std::fill_n(patch_mask, patches, false);
  const int64_t masked = share_of(problem.patch_ratio, patches);
  if (masked == 0) return;
  keys.clear();
  for (int64_t j = 0; j < patches; ++j) keys.push_back(sort_key(patch_score[j], j));
  mark_highest(keys, masked, patch_mask);
}

// Samples for each thread: no part outlives the next one.
void run_by_sample(const Problem& problem) {
  torch::stable::parallel_for(0, problem.batch, 1, [&](int64_t first, int64_t last) {
    Scratch scratch = make_scratch(problem);
    for (int64_t b = first; b < last; ++b) {
      const PatchRule rule = choose_words(problem, b, scratch.words);
      finish_sample(problem, b, scratch.words, rule, scratch, [&](int64_t h, int64_t begin) {
        run_part(problem, b, h, begin, scratch.words, rule, scratch, scratch.part.data());
        return scratch.part.data();
      });
    }
  });
}

// Parts for each thread, for a few samples: keeps B * H * ceil(T / width) parts.
void run_by_part(const Problem& problem) {
  const int64_t heads = problem.heads, size = problem.part_size();
  std::vector<std::vector<int32_t>> words(problem.batch);
  std::vector<PatchRule> rules(problem.batch);
  int64_t cuts = 1;
  for (int64_t b = 0; b < problem.batch; ++b) {
    rules[b] = choose_words(problem, b, words[b]);
    cuts = std::max<int64_t>(cuts, (words[b].size() + runner.width - 1) / runner.width);
  }
  std::vector<float> parts(problem.batch * heads * cuts * size);
  torch::stable::parallel_for(0, problem.batch * heads * cuts, 1, [&](int64_t first, int64_t last) {
    Scratch scratch = make_scratch(problem);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / (heads * cuts), h = i / cuts % heads, begin = i % cuts * runner.width;
      if (begin >= static_cast<int64_t>(words[b].size())) continue;
      run_part(problem, b, h, begin, words[b], rules[b], scratch, parts.data() + i * size);
    }
  });
  Scratch scratch;
  scratch.head.resize(problem.patches);
  for (int64_t b = 0; b < problem.batch; ++b) {
    finish_sample(problem, b, words[b], rules[b], scratch, [&](int64_t h, int64_t begin) {
      return parts.data() + ((b * heads + h) * cuts + begin / runner.width) * size;
    });
  }
}

template <typename Rule>
Rule rule_named(const std::string& name, const std::vector<std::pair<const char*, Rule>>& rules) {
  for (const auto& [other, rule] : rules) {
    if (name == other) return rule;
  }
  STD_TORCH_CHECK(false, "sync_mask: unknown rule ", name);
}

void check_features(const Tensor& x, const Tensor& q, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == rows &&
                      x.size(3) == q.size(3) && x.scalar_type() == q.scalar_type(),
                  "sync_mask: q, k and v must be [B, H, T or 1+P, D] of one dtype");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sync_mask(Tensor q, Tensor k, Tensor maskable, std::optional<Tensor> v,
                                                     double token_ratio, double patch_ratio,
                                                     std::string token_score, std::string patch_score,
                                                     double scale) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "sync_mask: q must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.size(2) >= 2 && q.size(1) >= 1 && q.size(2) >= 1,
                  "sync_mask: q must be [B, H, T, D] and k [B, H, 1+P, D] with at least one patch");
  check_features(k, q, k.size(2));
  if (v.has_value()) check_features(*v, q, k.size(2));
  STD_TORCH_CHECK(maskable.dim() == 2 && maskable.size(0) == q.size(0) && maskable.size(1) == q.size(2) &&
                      maskable.scalar_type() == ScalarType::Bool,
                  "sync_mask: maskable must be bool [B, T]");
  STD_TORCH_CHECK(token_ratio >= 0 && token_ratio <= 1 && patch_ratio >= 0 && patch_ratio <= 1,
                  "sync_mask: ratios must lie in 0 .. 1");
  STD_TORCH_CHECK(std::max(q.size(2), k.size(2)) <= std::numeric_limits<int32_t>::max(),
                  "sync_mask: more than 2^31 tokens or patches");

  Problem problem{q, k, maskable, v};
  problem.token_ratio = token_ratio;
  problem.patch_ratio = patch_ratio;
  problem.scale = static_cast<float>(scale);
  problem.token_rule = rule_named<TokenRule>(token_score, {{"peak", TokenRule::kPeak},
                                                           {"mass", TokenRule::kMass},
                                                           {"cls", TokenRule::kCls},
                                                           {"output", TokenRule::kOutput}});
  problem.patch_rule = rule_named<PatchRule>(patch_score, {{"mean", PatchRule::kMean},
                                                           {"cls", PatchRule::kCls},
                                                           {"weighted", PatchRule::kWeighted},
                                                           {"max", PatchRule::kMax}});
  STD_TORCH_CHECK(v.has_value() || problem.token_rule != TokenRule::kOutput,
                  "sync_mask: token_score \"output\" needs v");
  problem.batch = q.size(0);
  problem.heads = q.size(1);
  problem.tokens = q.size(2);
  problem.columns = q.size(3);
  problem.patches = k.size(2) - 1;

  Tensor token_mask = torch::stable::new_empty(maskable, {problem.batch, problem.tokens});
  Tensor patch_mask = torch::stable::new_empty(maskable, {problem.batch, problem.patches});
  Tensor token = torch::stable::new_empty(q, {problem.batch, problem.tokens}, ScalarType::Float);
  Tensor patch = torch::stable::new_empty(q, {problem.batch, problem.patches}, ScalarType::Float);
  problem.maskable_data = static_cast<const bool*>(maskable.const_data_ptr());
  problem.token_mask = static_cast<bool*>(token_mask.mutable_data_ptr());
  problem.patch_mask = static_cast<bool*>(patch_mask.mutable_data_ptr());
  problem.token_score = static_cast<float*>(token.mutable_data_ptr());
  problem.patch_score = static_cast<float*>(patch.mutable_data_ptr());

  // By part where there are few samples, so that no thread waits long for the last one.
  constexpr int64_t kSamplesPerThread = 8;
  if (problem.batch >= kSamplesPerThread * static_cast<int64_t>(torch::stable::get_num_threads())) {
    run_by_sample(problem);
  } else {
    run_by_part(problem);
  }
  return {token_mask, patch_mask, token, patch};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) {
  m.impl("sync_mask", TORCH_BOX(&sync_mask));
}
