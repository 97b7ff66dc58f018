// The CPU kernel of syncmask::group_semi_hard: the walk that kernels/group_semi_hard.py defines, where its
// schema is too.
//
// Each step scans every unvisited item of its run with a float32 dot product and keeps the best of three
// levels at once: all unvisited, those with an allowed id, and the near misses among these. Items are kept in
// ascending order and a later one wins only if it is strictly higher, so that ties go to the lowest index for
// any number of threads.
//
// Letters: n items of a run, D features.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <unordered_map>
#include <vector>

#include "cpu.h"

#ifndef SYNCMASK_BUILD_STAMP
#define SYNCMASK_BUILD_STAMP "unknown build"
#endif

extern "C" __attribute__((visibility("default"))) const char* syncmask_build_stamp() {
  return SYNCMASK_BUILD_STAMP;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// A thread is woken for about 0.1 ms of work. Less pays on an idle machine only: on a busy one each step
// waits until the last thread has had its turn.
constexpr int64_t kMinMultipliesPerThread = 1 << 20;

enum Level { kUnvisited, kAllowed, kNearMiss, kLevels };

struct Best {
  float score = kLowest;
  int32_t item = -1;

  void offer(float other_score, int32_t other_item) {
    if (item < 0 || other_score > score) {
      score = other_score;
      item = other_item;
    }
  }
};

struct Candidates {
  Best of_level[kLevels];
};

// What one step compares all unvisited items with.
struct Query {
  const float* feature;    // [D]
  const float* targets;    // [n, D]
  int64_t width;           // D
  const int32_t* product;  // [n], numbered from 0
  const int64_t* batch_of; // [products]: the last batch that holds the product
  int32_t current_product;
  int64_t batch;
  float threshold;
};

// One build for every x86-64 processor: the scan in two instruction sets, picked at run time.
#ifdef SYNCMASK_HAS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "scan.h"
}
#pragma GCC pop_options
#endif
namespace plain {
#include "scan.h"
}

struct Scanner {
  decltype(&plain::scan) scan = plain::scan;
  decltype(&plain::own_similarity) own_similarity = plain::own_similarity;
};

Scanner widest_scanner() {
#ifdef SYNCMASK_HAS_X86
  if (syncmask::widest_isa() != syncmask::Isa::kPlain) return {avx2::scan, avx2::own_similarity};
#endif
  return {};
}

const Scanner scanner = widest_scanner();

int32_t next_item(const Query& query, const std::vector<int32_t>& unvisited, std::vector<Candidates>& parts) {
  const int64_t count = unvisited.size();
  const int64_t work = count * std::max<int64_t>(query.width, 1);
  const int64_t threads = std::clamp<int64_t>(work / kMinMultipliesPerThread, 1, parts.size());
  const int64_t share = (count + threads - 1) / threads;
  const auto scan_parts = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = std::min(count, part * share);
      parts[part] = Candidates();
      scanner.scan(query, unvisited.data() + first, std::min(count - first, share), parts[part]);
    }
  };
  if (threads == 1) {
    scan_parts(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, scan_parts);
  }
  for (int level = kNearMiss; level >= kUnvisited; --level) {
    Best best;
    for (int64_t part = 0; part < threads; ++part) {
      const Best& other = parts[part].of_level[level];
      if (other.item >= 0) best.offer(other.score, other.item);
    }
    if (best.item >= 0) return best.item;
  }
  return unvisited.front();  // not reached: the first level takes every item
}

// Products numbered from 0 in order of appearance.
std::vector<int32_t> number_products(const int64_t* ids, int64_t n, int32_t& products) {
  std::unordered_map<int64_t, int32_t> number;
  std::vector<int32_t> product(n);
  for (int64_t i = 0; i < n; ++i) product[i] = number.emplace(ids[i], number.size()).first->second;
  products = number.size();
  return product;
}

void walk(const float* images, const float* texts, const int64_t* ids, int64_t n, int64_t width,
          int64_t batch_size, float margin, int64_t start, int64_t offset, int64_t* order) {
  int32_t products = 0;
  const std::vector<int32_t> product = number_products(ids, n, products);
  std::vector<int64_t> batch_of(products, -1);
  std::vector<int32_t> unvisited(n);
  std::iota(unvisited.begin(), unvisited.end(), 0);
  std::vector<Candidates> parts(std::max<int64_t>(1, torch::stable::get_num_threads()));

  int32_t current = start;
  for (int64_t position = 0; position < n; ++position) {
    const int64_t batch = position / batch_size;
    if (position > 0) {
      const bool from_image = position % 2 == 1;
      Query query;
      query.feature = (from_image ? images : texts) + current * width;
      query.targets = from_image ? texts : images;
      query.width = width;
      query.product = product.data();
      query.batch_of = batch_of.data();
      query.current_product = product[current];
      query.batch = batch;
      const float own = scanner.own_similarity(images + current * width, texts + current * width, width);
      query.threshold = own - margin;
      current = next_item(query, unvisited, parts);
    }
    order[position] = offset + current;
    batch_of[product[current]] = batch;
    unvisited.erase(std::lower_bound(unvisited.begin(), unvisited.end(), current));
  }
}

Tensor group_semi_hard(Tensor image_feats, Tensor text_feats, Tensor ids, int64_t batch_size, double margin,
                       int64_t start, std::optional<int64_t> search_space) {
  for (const Tensor& feats : {image_feats, text_feats}) {
    STD_TORCH_CHECK(feats.dim() == 2 && feats.scalar_type() == ScalarType::Float && feats.is_contiguous(),
                    "group_semi_hard: features must be contiguous float32 [N, D]");
  }
  const int64_t n = image_feats.size(0), width = image_feats.size(1);
  STD_TORCH_CHECK(text_feats.size(0) == n && text_feats.size(1) == width,
                  "group_semi_hard: features differ in shape");
  STD_TORCH_CHECK(
      ids.dim() == 1 && ids.size(0) == n && ids.scalar_type() == ScalarType::Long && ids.is_contiguous(),
      "group_semi_hard: ids must be contiguous int64 [N]");
  const int64_t run = std::max<int64_t>(1, std::min(n, search_space.value_or(n)));
  STD_TORCH_CHECK(run <= std::numeric_limits<int32_t>::max(),
                  "group_semi_hard: more than 2^31 items in one walk");
  STD_TORCH_CHECK(batch_size >= 1 && start >= 0 && start < run && search_space.value_or(1) >= 1,
                  "group_semi_hard: batch_size, start or search_space out of range");

  Tensor order = torch::stable::new_empty(ids, {n});
  const float* images = image_feats.const_data_ptr<float>();
  const float* texts = text_feats.const_data_ptr<float>();
  const int64_t* products = ids.const_data_ptr<int64_t>();
  int64_t* out = order.mutable_data_ptr<int64_t>();
  for (int64_t begin = 0; begin < n; begin += run) {
    walk(images + begin * width, texts + begin * width, products + begin, std::min(run, n - begin), width,
         batch_size, static_cast<float>(margin), begin == 0 ? start : 0, begin, out + begin);
  }
  return order;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) {
  m.impl("group_semi_hard", TORCH_BOX(&group_semi_hard));
}
