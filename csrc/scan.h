// One scan of a walk, included once per instruction set by group_semi_hard.cpp (so no include guard): the
// compiler splits vector types for the target in force where the code stands, not where it is inlined.

typedef float Lanes __attribute__((vector_size(32)));
constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
constexpr int64_t kSums = 4;  // independent sums hide the latency of an addition

inline __attribute__((always_inline)) float dot(const float* a, const float* b, int64_t width) {
  Lanes sums[kSums] = {};
  Lanes x, y;
  int64_t d = 0;
  for (; d + kSums * kLanes <= width; d += kSums * kLanes) {
    for (int64_t i = 0; i < kSums; ++i) {
      std::memcpy(&x, a + d + i * kLanes, sizeof x);
      std::memcpy(&y, b + d + i * kLanes, sizeof y);
      sums[i] += x * y;
    }
  }
  const Lanes lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = (lanes[0] + lanes[4]) + (lanes[1] + lanes[5]);
  sum += (lanes[2] + lanes[6]) + (lanes[3] + lanes[7]);
  for (; d < width; ++d) sum += a[d] * b[d];
  return sum;
}

void scan(const Query& query, const int32_t* items, int64_t count, Candidates& best) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t item = items[i];
    const float raw = dot(query.feature, query.targets + item * query.width, query.width);
    const float score = raw == raw ? raw : kLowest;  // NaN counts as -inf
    const int32_t product = query.product[item];
    best.of_level[kUnvisited].offer(score, item);
    if (product == query.current_product || query.batch_of[product] == query.batch) continue;
    best.of_level[kAllowed].offer(score, item);
    if (raw < query.threshold) best.of_level[kNearMiss].offer(score, item);
  }
}

float own_similarity(const float* image, const float* text, int64_t width) { return dot(image, text, width); }
