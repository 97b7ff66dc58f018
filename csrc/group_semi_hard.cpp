// The CPU kernel of syncmask::group_semi_hard: the walk that kernels/group_semi_hard.py defines, where its
// schema is too.
//
// One blocked product of all images with all texts gives every item two neighbor lists, one for each direction in
// which the walk may leave it; the product itself is never written. The walk takes the best entry that is unvisited and
// allowed. Where a list has none left, a scan over all unvisited items decides; when scans have cost as much as new
// lists would, the unvisited are moved together and get new lists among themselves.
//
// Letters: n items of a run, D features. A place is the number of an item among those that had lists made last.

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
#include <utility>
#include <vector>

#include "strided.h"
#include "walk_order.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

// A thread is woken for about 0.1 ms of work. Less pays on an idle machine only: on a busy one each step
// waits until the last thread has had its turn.
constexpr int64_t kMinMultipliesPerThread = 1 << 20;
// A similarity of a scan costs about as much as so many of a blocked product, which reads its operands from a cache.
constexpr int64_t kScanCost = 6;
constexpr int64_t kBlockPanels = 16;  // two sides of a block and their lists fit a cache of 2 MB at D = 256
constexpr int64_t kMinNeighbors = 24, kMaxNeighbors = 128;

// The neighbors of items in one direction: of all items, those with the highest keys, in no order. What has a key above
// the bound is still to be added.
struct Lists {
  uint64_t* entries;  // [places, capacity]
  int32_t* count;     // [places]
  uint32_t* bound;    // [places]
  int64_t capacity;
};

// Items that had lists made last. Arrays are padded to whole panels: features 0, bound at its highest, unvisited 0.
struct Remaining {
  int64_t count, width;
  const float* images;       // [panels, D, panel]
  const float* texts;        // [panels, D, panel]
  const int32_t* product;    // [places], numbered from 0
  const int32_t* threshold;  // [places], ordered
  const int32_t* unvisited;  // [places], -1 or 0
  Lists of_image, of_text;
};

// What one step compares items with.
struct Query {
  const float* feature;     // [D]
  const float* targets;     // panels of the other modality
  const int64_t* batch_of;  // [products]: the last batch that holds the product
  int32_t product;
  int64_t batch;
  int32_t threshold;
  bool any_product;

  bool allows(int32_t other) const { return any_product || (other != product && batch_of[other] != batch); }
};

struct Kernels {
  int64_t panel;  // items of a panel
  void (*find_thresholds)(const Remaining& items, int64_t panel, float margin, int32_t* threshold);
  void (*sample_bounds)(const Remaining& items, int64_t image_panel, int64_t text_panel);
  void (*fill_block)(const Remaining& items, int64_t first_row, int64_t last_row, int64_t first_column,
                     int64_t last_column);
  uint64_t (*scan)(const Query& query, const Remaining& items, int64_t first, int64_t last);
};

}  // namespace

#define SYNCMASK_KERNEL "group_semi_hard_kernel.inl"
#include "isa.h"

namespace {

// Walks over runs of up to `size` items, in memory that is taken once.
class Walk {
 public:
  Walk(int64_t size, int64_t width, int64_t batch_size, float margin, int64_t neighbors)
      : width_(width),
        batch_size_(batch_size),
        margin_(margin),
        capacity_(neighbors > 0 ? neighbors : std::clamp(size / 128, kMinNeighbors, kMaxNeighbors)),
        places_((size + kernels().panel - 1) / kernels().panel * kernels().panel),
        image_panels_(places_ * width),
        text_panels_(places_ * width),
        entries_(2 * places_ * capacity_),
        counts_(2 * places_),
        bounds_(2 * places_),
        product_(places_),
        threshold_(places_),
        unvisited_(places_) {}

  void run(const float* images, const float* texts, const int64_t* ids, int64_t n, int64_t start, int64_t offset,
           int64_t* order) {
    images_ = images;
    texts_ = texts;
    number_products(ids, n);
    item_.resize(n);
    place_.resize(n);
    std::iota(item_.begin(), item_.end(), 0);
    gather();
    for_panels([&](int64_t panel) { kernels().find_thresholds(remaining(), panel, margin_, threshold_.data()); });
    make_lists();

    int64_t current = start;
    for (int64_t position = 0; position < n; ++position) {
      const int64_t batch = position / batch_size_;
      if (position > 0) current = next_item(current, position, n - position);
      order[position] = offset + current;
      batch_of_[product_of_item_[current]] = batch;
      unvisited_[place_[current]] = 0;
    }
  }

 private:
  // Products numbered from 0 in order of appearance.
  void number_products(const int64_t* ids, int64_t n) {
    std::unordered_map<int64_t, int32_t> number;
    product_of_item_.resize(n);
    for (int64_t i = 0; i < n; ++i) product_of_item_[i] = number.emplace(ids[i], number.size()).first->second;
    batch_of_.assign(number.size(), -1);
  }

  Remaining remaining() const {
    const Lists of_image{entries_.data(), counts_.data(), bounds_.data(), capacity_};
    const Lists of_text{entries_.data() + places_ * capacity_, counts_.data() + places_, bounds_.data() + places_,
                        capacity_};
    return {count(),
            width_,
            image_panels_.data(),
            text_panels_.data(),
            product_.data(),
            threshold_.data(),
            unvisited_.data(),
            of_image,
            of_text};
  }

  int64_t count() const { return item_.size(); }
  int64_t panels() const { return (count() + kernels().panel - 1) / kernels().panel; }

  template <typename Function>
  void for_panels(const Function& function) const {
    torch::stable::parallel_for(0, panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) function(panel);
    });
  }

  // Features of the items item_, in ascending order, and what goes with their places but thresholds and lists.
  void gather() {
    const int64_t size = kernels().panel;
    for_panels([&](int64_t panel) {
      const int64_t begin = panel * size, items = std::min(size, count() - begin);
      for (int64_t place = begin; place < begin + size; ++place) {
        const bool is_item = place < begin + items;
        unvisited_[place] = is_item ? -1 : 0;
        product_[place] = is_item ? product_of_item_[item_[place]] : -1;
        if (is_item) place_[item_[place]] = place;
      }
      const std::pair<const float*, float*> sides[] = {{images_, image_panels_.data()}, {texts_, text_panels_.data()}};
      for (const auto& [features, panels] : sides) {
        float* to = panels + begin * width_;
        std::fill_n(to, items < size ? size * width_ : 0, 0.0f);
        for (int64_t d = 0; d < width_; ++d, to += size) {
          for (int64_t l = 0; l < items; ++l) to[l] = features[item_[begin + l] * width_ + d];
        }
      }
    });
  }

  // In waves of blocks that share no item, each after the blocks above it and left of it: so that a list is offered its
  // items in ascending order, whatever the number of threads.
  void make_lists() {
    const Remaining items = remaining();
    for (const Lists& lists : {items.of_image, items.of_text}) {
      std::fill_n(lists.count, panels() * kernels().panel, 0);
      std::fill_n(lists.bound, count(), 0);
      std::fill_n(lists.bound + count(), panels() * kernels().panel - count(), 0xffffffffu);
    }
    // About two in a panel are above such a bound. Panels half the items apart, since neighbors may be alike.
    if (count() > kernels().panel * capacity_) {
      for_panels([&](int64_t panel) { kernels().sample_bounds(items, panel, (panel + panels() / 2) % panels()); });
    }
    const int64_t size = std::clamp<int64_t>(panels() / 16, 1, kBlockPanels);
    const int64_t blocks = (panels() + size - 1) / size;
    for (int64_t wave = 0; wave < 2 * blocks - 1; ++wave) {
      const int64_t first = std::max<int64_t>(0, wave - blocks + 1), last = std::min(wave, blocks - 1);
      torch::stable::parallel_for(first, last + 1, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t column = wave - row;
          kernels().fill_block(items, row * size, std::min(panels(), (row + 1) * size), column * size,
                               std::min(panels(), (column + 1) * size));
        }
      });
    }
    scanned_ = 0;
  }

  // Moves the unvisited items together, and makes lists among them.
  void remake_lists() {
    int64_t kept = 0;
    for (int64_t place = 0; place < count(); ++place) {
      if (unvisited_[place] == 0) continue;
      item_[kept] = item_[place];
      threshold_[kept++] = threshold_[place];
    }
    item_.resize(kept);
    gather();
    make_lists();
  }

  int64_t next_item(int64_t current, int64_t position, int64_t left) {
    const bool from_image = position % 2 == 1;
    const Remaining items = remaining();
    Query query;
    query.feature = (from_image ? images_ : texts_) + current * width_;
    query.targets = from_image ? items.texts : items.images;
    query.batch_of = batch_of_.data();
    query.product = product_of_item_[current];
    query.batch = position / batch_size_;
    query.threshold = threshold_[place_[current]];
    query.any_product = false;
    uint64_t best = best_in_list(query, from_image ? items.of_image : items.of_text, place_[current]);
    if (best != 0) return item_[place_of(best)];
    best = best_of_all(query);
    if (best == 0) {  // nothing is allowed: the highest
      query.any_product = true;
      query.threshold = kNoThreshold;
      best = best_of_all(query);
    }
    const int64_t next = item_[place_of(best)];
    if (scanned_ * kScanCost > left * left) remake_lists();
    return next;
  }

  uint64_t best_in_list(const Query& query, const Lists& lists, int64_t place) const {
    const uint64_t* list = lists.entries + place * lists.capacity;
    uint64_t best = 0;
    for (int64_t i = 0; i < lists.count[place]; ++i) {
      const int64_t other = place_of(list[i]);
      if (list[i] > best && unvisited_[other] && query.allows(product_[other])) best = list[i];
    }
    return best;
  }

  uint64_t best_of_all(const Query& query) {
    scanned_ += count();
    const int64_t work = count() * std::max<int64_t>(width_, 1);
    const int64_t threads =
        std::clamp<int64_t>(work / kMinMultipliesPerThread, 1, std::max<int64_t>(1, torch::stable::get_num_threads()));
    const int64_t share = (panels() + threads - 1) / threads;
    std::vector<uint64_t> best(threads);
    const auto scan_shares = [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        best[part] = kernels().scan(query, remaining(), part * share, std::min(panels(), (part + 1) * share));
      }
    };
    if (threads == 1) {
      scan_shares(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, scan_shares);
    }
    return *std::max_element(best.begin(), best.end());
  }

  const float* images_ = nullptr;
  const float* texts_ = nullptr;
  int64_t width_, batch_size_;
  float margin_;
  int64_t capacity_, places_;
  std::vector<int32_t> product_of_item_;
  std::vector<int64_t> batch_of_;
  std::vector<int32_t> item_;   // of a place
  std::vector<int32_t> place_;  // of an item
  AlignedBuffer<float> image_panels_, text_panels_;
  AlignedBuffer<uint64_t> entries_;
  AlignedBuffer<int32_t> counts_;
  AlignedBuffer<uint32_t> bounds_;
  AlignedBuffer<int32_t> product_, threshold_, unvisited_;
  int64_t scanned_ = 0;  // similarities of scans since lists were made
};

Tensor group_semi_hard(Tensor image_feats, Tensor text_feats, Tensor ids, int64_t batch_size, double margin,
                       int64_t start, std::optional<int64_t> search_space, int64_t neighbors) {
  for (const Tensor& feats : {image_feats, text_feats}) {
    STD_TORCH_CHECK(feats.dim() == 2 && feats.scalar_type() == ScalarType::Float && feats.is_contiguous(),
                    "group_semi_hard: features must be contiguous float32 [N, D]");
  }
  const int64_t n = image_feats.size(0), width = image_feats.size(1);
  STD_TORCH_CHECK(text_feats.size(0) == n && text_feats.size(1) == width, "group_semi_hard: features differ in shape");
  STD_TORCH_CHECK(ids.dim() == 1 && ids.size(0) == n && ids.scalar_type() == ScalarType::Long && ids.is_contiguous(),
                  "group_semi_hard: ids must be contiguous int64 [N]");
  const int64_t run = std::max<int64_t>(1, std::min(n, search_space.value_or(n)));
  STD_TORCH_CHECK(run <= std::numeric_limits<int32_t>::max(), "group_semi_hard: more than 2^31 items in one walk");
  STD_TORCH_CHECK(neighbors >= 0 && neighbors != 1 && neighbors <= kMaxNeighbors,
                  "group_semi_hard: neighbors out of range");
  STD_TORCH_CHECK(batch_size >= 1 && start >= 0 && start < run && search_space.value_or(1) >= 1,
                  "group_semi_hard: batch_size, start or search_space out of range");

  Tensor order = torch::stable::new_empty(ids, {n});
  const float* images = image_feats.const_data_ptr<float>();
  const float* texts = text_feats.const_data_ptr<float>();
  const int64_t* products = ids.const_data_ptr<int64_t>();
  int64_t* out = order.mutable_data_ptr<int64_t>();
  if (n == 0) return order;
  Walk walk(run, width, batch_size, static_cast<float>(margin), neighbors);
  for (int64_t begin = 0; begin < n; begin += run) {
    walk.run(images + begin * width, texts + begin * width, products + begin, std::min(run, n - begin),
             begin == 0 ? start : 0, begin, out + begin);
  }
  return order;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) { m.impl("group_semi_hard", TORCH_BOX(&group_semi_hard)); }
