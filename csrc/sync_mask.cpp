// The CPU kernel of syncmask::sync_mask; kernels/sync_mask.py has the definition and the schema.
//
// The work is cut into tasks: one sample, one head and up to 64 of its words. Only the words that count are computed.
// A task's attention weights are the scratch of a thread; its result is one score for each word and one for each patch.
// Results are summed over heads in one order, for any number of threads.
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

#include "strided.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

constexpr int64_t kMaxLanes = 16;

enum class TokenRule { kPeak, kMass, kCls, kOutput };
enum class PatchRule { kMean, kCls, kWeighted, kMax };

struct Task {
  Matrix q, k, v;
  const int32_t* words;  // rows of q
  int64_t count;
  float scale;
  TokenRule token_rule;
  PatchRule patch_rule;  // kCls takes the first word of the task
};

// What one thread works in.
struct Scratch {
  AlignedBuffer<float> queries;  // [D, width]
  AlignedBuffer<float> weights;  // [1+P and up to a vector more, width]
  AlignedBuffer<float> rows;     // some rows of q or k in float32, where they are not already
  AlignedBuffer<float> values;   // [1+P, D], the same
  AlignedBuffer<float> outputs;  // [D, width]
  AlignedBuffer<float> result;   // [width + P and up to a vector more]
  std::vector<float> head;       // [P]
  std::vector<int32_t> words;    // [T]
  std::vector<uint64_t> keys;    // [max(T, P)]
};

struct Kernels {
  void (*run)(const Task& task, Scratch& scratch, float* token, float* patch);
  int64_t width;  // words of a task
  int64_t rows;   // rows converted at a time, at least one for each lane
};

}  // namespace

#define SYNCMASK_KERNEL "sync_mask_kernel.inl"
#include "isa.h"

namespace {

struct Args {
  Tensor q, k, maskable;
  std::optional<Tensor> v;
  double token_ratio = 0, patch_ratio = 0;
  float scale = 0;
  TokenRule token_rule = TokenRule::kPeak;
  PatchRule patch_rule = PatchRule::kMax;
  int64_t batch = 0, heads = 0, tokens = 0, patches = 0, columns = 0;
  const bool* maskable_data = nullptr;
  bool *token_mask = nullptr, *patch_mask = nullptr;
  float *token_score = nullptr, *patch_score = nullptr;

  bool is_maskable(int64_t b, int64_t i) const {
    return maskable_data[b * maskable.stride(0) + i * maskable.stride(1)];
  }
  int64_t task_size() const { return kernels().width + patches + kMaxLanes; }
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

Scratch make_scratch(const Args& args) {
  Scratch scratch;
  const int64_t keys = 1 + args.patches, columns = args.columns;
  scratch.queries.resize(columns * kernels().width);
  scratch.weights.resize((keys + kMaxLanes) * kernels().width);
  scratch.rows.resize(kernels().rows * columns);
  if (args.token_rule == TokenRule::kOutput) {
    scratch.values.resize(keys * columns);
    scratch.outputs.resize(columns * kernels().width);
  }
  scratch.result.resize(args.task_size());
  scratch.head.resize(args.patches);
  return scratch;
}

// The rule and the words of a sample: its maskable tokens, and where the rule is "cls" token 0 before them. A
// sample without a maskable token has the rule "cls".
PatchRule choose_words(const Args& args, int64_t b, std::vector<int32_t>& words) {
  words.clear();
  for (int64_t i = 0; i < args.tokens; ++i) {
    const bool is_first = i == 0 && args.patch_rule == PatchRule::kCls;
    if (is_first || args.is_maskable(b, i)) words.push_back(i);
  }
  if (!words.empty()) return args.patch_rule;
  words.push_back(0);
  return PatchRule::kCls;
}

// result[0, width): a score of each word; result[width, width + P): a score of each patch.
void run_task(const Args& args, int64_t b, int64_t h, int64_t begin, const std::vector<int32_t>& words, PatchRule rule,
              Scratch& scratch, float* result) {
  Task task;
  task.q = matrix_of(args.q, b, h);
  task.k = matrix_of(args.k, b, h);
  if (args.token_rule == TokenRule::kOutput) task.v = matrix_of(*args.v, b, h);
  task.words = words.data() + begin;
  task.count = std::min<int64_t>(kernels().width, words.size() - begin);
  task.scale = args.scale;
  task.token_rule = args.token_rule;
  task.patch_rule = rule;
  kernels().run(task, scratch, result, result + kernels().width);
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

// Sums results, which task_result(h, begin) gives, over heads and writes what the operator returns of sample b.
template <typename PartOf>
void finish_sample(const Args& args, int64_t b, const std::vector<int32_t>& words, PatchRule rule, Scratch& scratch,
                   const PartOf& task_result) {
  const int64_t patches = args.patches, count = words.size();
  float* token_score = args.token_score + b * args.tokens;
  float* patch_score = args.patch_score + b * patches;
  std::fill_n(token_score, args.tokens, 0.0f);
  std::fill_n(patch_score, patches, 0.0f);
  float* head = scratch.head.data();
  for (int64_t h = 0; h < args.heads; ++h) {
    for (int64_t begin = 0; begin < count; begin += kernels().width) {
      const float* token = task_result(h, begin);
      const float* patch = token + kernels().width;
      const int64_t end = std::min(count, begin + kernels().width);
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
  const float heads = args.heads;
  std::vector<uint64_t>& keys = scratch.keys;
  keys.clear();
  for (int64_t i = 0; i < args.tokens; ++i) {
    const bool is_maskable = args.is_maskable(b, i);
    token_score[i] = is_maskable ? token_score[i] / heads : -std::numeric_limits<float>::infinity();
    if (is_maskable) keys.push_back(sort_key(token_score[i], i));
  }
  bool* token_mask = args.token_mask + b * args.tokens;
  std::fill_n(token_mask, args.tokens, false);
  mark_highest(keys, share_of(args.token_ratio, keys.size()), token_mask);

  for (int64_t j = 0; j < patches; ++j) patch_score[j] /= heads;
  bool* patch_mask = args.patch_mask + b * patches;
  std::fill_n(patch_mask, patches, false);
  const int64_t masked = share_of(args.patch_ratio, patches);
  if (masked == 0) return;
  keys.clear();
  for (int64_t j = 0; j < patches; ++j) keys.push_back(sort_key(patch_score[j], j));
  mark_highest(keys, masked, patch_mask);
}

// Samples for each thread: no result outlives the next one.
void run_by_sample(const Args& args) {
  torch::stable::parallel_for(0, args.batch, 1, [&](int64_t first, int64_t last) {
    Scratch scratch = make_scratch(args);
    for (int64_t b = first; b < last; ++b) {
      const PatchRule rule = choose_words(args, b, scratch.words);
      finish_sample(args, b, scratch.words, rule, scratch, [&](int64_t h, int64_t begin) {
        run_task(args, b, h, begin, scratch.words, rule, scratch, scratch.result.data());
        return scratch.result.data();
      });
    }
  });
}

// Tasks for each thread, for a few samples: keeps B * H * ceil(T / width) results.
void run_by_task(const Args& args) {
  const int64_t heads = args.heads, size = args.task_size();
  std::vector<std::vector<int32_t>> words(args.batch);
  std::vector<PatchRule> rules(args.batch);
  int64_t cuts = 1;
  for (int64_t b = 0; b < args.batch; ++b) {
    rules[b] = choose_words(args, b, words[b]);
    cuts = std::max<int64_t>(cuts, (words[b].size() + kernels().width - 1) / kernels().width);
  }
  std::vector<float> results(args.batch * heads * cuts * size);
  torch::stable::parallel_for(0, args.batch * heads * cuts, 1, [&](int64_t first, int64_t last) {
    Scratch scratch = make_scratch(args);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / (heads * cuts), h = i / cuts % heads, begin = i % cuts * kernels().width;
      if (begin >= static_cast<int64_t>(words[b].size())) continue;
      run_task(args, b, h, begin, words[b], rules[b], scratch, results.data() + i * size);
    }
  });
  Scratch scratch;
  scratch.head.resize(args.patches);
  for (int64_t b = 0; b < args.batch; ++b) {
    finish_sample(args, b, words[b], rules[b], scratch, [&](int64_t h, int64_t begin) {
      return results.data() + ((b * heads + h) * cuts + begin / kernels().width) * size;
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
                                                     double token_ratio, double patch_ratio, std::string token_score,
                                                     std::string patch_score, double scale) {
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
                  "sync_mask: ratios must be in 0 .. 1");
  STD_TORCH_CHECK(std::max(q.size(2), k.size(2)) <= std::numeric_limits<int32_t>::max(),
                  "sync_mask: more than 2^31 tokens or patches");

  Args args{q, k, maskable, v};
  args.token_ratio = token_ratio;
  args.patch_ratio = patch_ratio;
  args.scale = static_cast<float>(scale);
  args.token_rule = rule_named<TokenRule>(token_score, {{"peak", TokenRule::kPeak},
                                                        {"mass", TokenRule::kMass},
                                                        {"cls", TokenRule::kCls},
                                                        {"output", TokenRule::kOutput}});
  args.patch_rule = rule_named<PatchRule>(patch_score, {{"mean", PatchRule::kMean},
                                                        {"cls", PatchRule::kCls},
                                                        {"weighted", PatchRule::kWeighted},
                                                        {"max", PatchRule::kMax}});
  STD_TORCH_CHECK(v.has_value() || args.token_rule != TokenRule::kOutput, "sync_mask: token_score \"output\" needs v");
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.tokens = q.size(2);
  args.columns = q.size(3);
  args.patches = k.size(2) - 1;

  Tensor token_mask = torch::stable::new_empty(maskable, {args.batch, args.tokens});
  Tensor patch_mask = torch::stable::new_empty(maskable, {args.batch, args.patches});
  Tensor token = torch::stable::new_empty(q, {args.batch, args.tokens}, ScalarType::Float);
  Tensor patch = torch::stable::new_empty(q, {args.batch, args.patches}, ScalarType::Float);
  args.maskable_data = static_cast<const bool*>(maskable.const_data_ptr());
  args.token_mask = static_cast<bool*>(token_mask.mutable_data_ptr());
  args.patch_mask = static_cast<bool*>(patch_mask.mutable_data_ptr());
  args.token_score = static_cast<float*>(token.mutable_data_ptr());
  args.patch_score = static_cast<float*>(patch.mutable_data_ptr());

  // By task where there are few samples, so that no thread waits long for the last one.
  constexpr int64_t kSamplesPerThread = 8;
  if (args.batch >= kSamplesPerThread * static_cast<int64_t>(torch::stable::get_num_threads())) {
    run_by_sample(args);
  } else {
    run_by_task(args);
  }
  return {token_mask, patch_mask, token, patch};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) { m.impl("sync_mask", TORCH_BOX(&sync_mask)); }
