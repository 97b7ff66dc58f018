// Similarities of the walk.
//
// Features are in panels of kPanel items, [D, kPanel] each: lane l of vector t belongs to item t * kLanes + l of the
// panel. One function makes all similarities, and adds in the order of the features: a list and a scan give the same
// bits, and image . text the same as text . image.

#include "simd.h"

constexpr int kVectors = 3, kPanel = kLanes * kVectors;
constexpr int kRows = kLanes == 16 ? 8 : 4;  // of a tile, whose sums fit the registers
static_assert(kPanel % kRows == 0, "a panel is cut into whole tiles");

// sum[i][t] = similarities of row i with vector t of the panel; element d of row i is rows[d * kStride + i].
template <int kCount, int kStride>
INLINE void similarities(const float* rows, const float* panel, int64_t width, Lanes (&sum)[kCount][kVectors]) {
  multiply<kCount, kVectors>({rows, 1, kStride}, panel, kPanel, width, sum);
}

// ordered() of every lane.
INLINE Ints ordered_lanes(Lanes x) {
  const Lanes lowest = Lanes{} - __builtin_inff();
  const Ints bits = (Ints)((x > lowest ? x : lowest) + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Thresholds of the items of panel `panel`, ordered.
void find_thresholds(const Remaining& items, int64_t panel, float margin, int32_t* threshold) {
  const int64_t at = panel * kPanel * items.width;
  for (int row = 0; row < kPanel; row += kRows) {
    Lanes sum[kRows][kVectors];
    similarities<kRows, kPanel>(items.images + at + row, items.texts + at, items.width, sum);
    for (int i = 0; i < kRows; ++i) {
      const int item = row + i;
      threshold[panel * kPanel + item] = ordered_threshold(sum[i][item / kLanes][item % kLanes], margin);
    }
  }
}

// Second highest of key(0) .. key(kPanel - 1).
template <typename Function>
INLINE uint32_t second_highest(const Function& key) {
  uint32_t first = 0, second = 0;
  for (int l = 0; l < kPanel; ++l) {
    const uint32_t x = key(l);
    second = std::max(second, std::min(first, x));
    first = std::max(first, x);
  }
  return second;
}

// Bounds of the images of one panel and the texts of another from their similarities to each other.
void sample_bounds(const Remaining& items, int64_t image_panel, int64_t text_panel) {
  const int64_t size = kPanel * items.width;
  int32_t order[kPanel][kPanel];
  for (int row = 0; row < kPanel; row += kRows) {
    Lanes sum[kRows][kVectors];
    similarities<kRows, kPanel>(items.images + image_panel * size + row, items.texts + text_panel * size, items.width,
                                sum);
    for (int i = 0; i < kRows; ++i) {
      for (int t = 0; t < kVectors; ++t) {
        const Ints x = ordered_lanes(sum[i][t]);
        __builtin_memcpy(order[row + i] + t * kLanes, &x, sizeof x);
      }
    }
  }
  for (int l = 0; l < kPanel; ++l) {
    const int64_t image = image_panel * kPanel + l, text = text_panel * kPanel + l;
    if (image < items.count) {
      items.of_image.bound[image] = second_highest([&](int j) { return key_of(order[l][j], items.threshold[image]); });
    }
    if (text < items.count) {
      items.of_text.bound[text] = second_highest([&](int i) { return key_of(order[i][l], items.threshold[text]); });
    }
  }
}

// Leaves the best `kept` in a list that is full. What is offered later with the key of the last of them has a higher
// place, and so is rightly left out. Ranks by counting, since branches would often be mispredicted.
__attribute__((noinline)) void keep_best(const Lists& lists, int64_t item, int64_t kept) {
  uint64_t* list = lists.entries + item * lists.capacity;
  uint64_t sorted[kMaxNeighbors];
  for (int64_t i = 0; i < lists.capacity; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < lists.capacity; ++j) rank += list[j] > list[i];
    sorted[rank] = list[i];
  }
  std::copy_n(sorted, kept, list);
  lists.count[item] = kept;
  lists.bound[item] = sorted[kept - 1] >> 32;
}

// Adds the item at `place` of `places`, whose key is above the bound. A full list is cut so that it ends about three
// quarters full if what is still to come is like what came.
INLINE void add(const Lists& lists, int64_t item, uint32_t key, int64_t place, int64_t places) {
  int32_t& count = lists.count[item];
  lists.entries[item * lists.capacity + count++] = entry_of(key, place);
  if (count == lists.capacity)
    keep_best(lists, item, std::max<int64_t>({1, lists.capacity / 4, lists.capacity * 3 / 4 * (place + 1) / places}));
}

// Puts the tile of rows from `row` on and columns from `column` on into the lists that it belongs to.
__attribute__((noinline)) void offer_tile(const Remaining& items, int64_t row, int64_t column,
                                          const Ints (&order)[kRows][kVectors]) {
  static_assert(kPanel <= 64, "a bit for each column");
  for (int64_t i = row; i < std::min(row + kRows, items.count); ++i) {
    uint64_t row_bits = 0, column_bits = 0;
#pragma GCC unroll 4
    for (int t = 0; t < kVectors; ++t) {
      const int64_t at = column + t * kLanes;
      const Words x = (Words)order[i - row][t];
      const Ints above_row = x - static_cast<uint32_t>(items.threshold[i]) > items.of_image.bound[i];
      const Ints above_column = x - load<Words>(items.threshold + at) > load<Words>(items.of_text.bound + at);
      row_bits |= static_cast<uint64_t>(bits_of(above_row)) << (t * kLanes);
      column_bits |= static_cast<uint64_t>(bits_of(above_column)) << (t * kLanes);
    }
    for (uint64_t bits = row_bits | column_bits; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctzll(bits);
      const int64_t j = column + lane;
      if (j >= items.count || items.product[i] == items.product[j]) continue;
      const int32_t x = order[i - row][lane / kLanes][lane % kLanes];
      const uint32_t row_key = key_of(x, items.threshold[i]);
      if (row_key > items.of_image.bound[i]) add(items.of_image, i, row_key, j, items.count);
      if (column_bits >> lane & 1) add(items.of_text, j, key_of(x, items.threshold[j]), i, items.count);
    }
  }
}

// Offers each pair of an image of panels first_row .. last_row - 1 and a text of panels first_column .. last_column - 1
// to the lists of both. Every list is offered its items in ascending order.
void fill_block(const Remaining& items, int64_t first_row, int64_t last_row, int64_t first_column,
                int64_t last_column) {
  const int64_t size = kPanel * items.width;
  for (int64_t row = first_row * kPanel; row < last_row * kPanel; row += kRows) {
    const float* images = items.images + row / kPanel * size + row % kPanel;
    for (int64_t panel = first_column; panel < last_column; ++panel) {
      const int64_t column = panel * kPanel;
      Lanes sum[kRows][kVectors];
      similarities<kRows, kPanel>(images, items.texts + panel * size, items.width, sum);
      Ints order[kRows][kVectors], any = {};
      Words threshold[kVectors], column_best[kVectors] = {};
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t) threshold[t] = load<Words>(items.threshold + column + t * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Words row_threshold = Words{} + static_cast<uint32_t>(items.threshold[row + i]);
        Words row_best = {};
#pragma GCC unroll 4
        for (int t = 0; t < kVectors; ++t) {
          order[i][t] = ordered_lanes(sum[i][t]);
          row_best = higher((Words)order[i][t] - row_threshold, row_best);
          column_best[t] = higher((Words)order[i][t] - threshold[t], column_best[t]);
        }
        any |= row_best > items.of_image.bound[row + i];
      }
#pragma GCC unroll 4
      for (int t = 0; t < kVectors; ++t) any |= column_best[t] > load<Words>(items.of_text.bound + column + t * kLanes);
      if (bits_of(any) != 0) offer_tile(items, row, column, order);
    }
  }
}

// The best entry among the unvisited items of panels first .. last - 1, as of Lists; 0 where there is none.
uint64_t scan(const Query& query, const Remaining& items, int64_t first, int64_t last) {
  uint64_t best = 0;
  for (int64_t panel = first; panel < last; ++panel) {
    Lanes sum[1][kVectors];
    similarities<1, 1>(query.feature, query.targets + panel * kPanel * items.width, items.width, sum);
    for (int t = 0; t < kVectors; ++t) {
      const int64_t begin = panel * kPanel + t * kLanes;
      const Words key = (Words)ordered_lanes(sum[0][t]) - static_cast<uint32_t>(query.threshold);
      const Ints above = best == 0 ? Ints{} - 1 : (Ints)(key > static_cast<uint32_t>(best >> 32));
      for (uint32_t bits = bits_of(above & load<Ints>(items.unvisited + begin)); bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        const uint64_t entry = entry_of(key[lane], begin + lane);
        if (entry > best && query.allows(items.product[begin + lane])) best = entry;
      }
    }
  }
  return best;
}

const Kernels kernels{kPanel, find_thresholds, sample_bounds, fill_block, scan};
