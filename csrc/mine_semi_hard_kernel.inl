// The products of mine_semi_hard and their first sieve. Lane l of vector t is candidate t * kLanes + l of a tile.

#include "simd.h"

constexpr int kRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4, kVectors = 2;  // of a tile, whose sums fit the registers
constexpr int kWidth = kVectors * kLanes;

// Panels of `size` rows, to[panel][c][row]; the last one is filled up with its last row. A panel is whole vectors wide
// or less than one: then a column's last lanes are overwritten by the next column, and the last column's come after it.
void pack(const Matrix& from, int64_t first, int64_t count, int64_t size, float* buffer, float* to) {
  for (int64_t i = 0; i < count; i += size, to += size * from.columns) {
    for (int64_t t = 0; t < size; t += kLanes) {
      const float* rows[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t row = first + (i + t + l < count ? i + t + l : count - 1);
        rows[l] = read_rows(from, row, 1, buffer + l * from.columns).data;
      }
      interleave_rows(rows, from.columns, size, to + t);
    }
  }
}

// Bit l: whether in lane l not rank <= floor, and score < limit.
INLINE uint64_t passing(Lanes rank, Lanes floor, Lanes score, Lanes limit) {
#if SYNCMASK_LANES == 16
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(score, limit, _CMP_LT_OQ), rank, floor, _CMP_NLE_UQ);
#else
  return bits_of(~(rank <= floor) & (score < limit));
#endif
}

// The hash "lowbias32" of the operator's definition, of one word or of a vector of words.
template <typename T>
INLINE T mix(T x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// At least the noise of a hash, and at most about 0.06 more where it is large: -log(-log1p(-u)) is below -log(u), and
// the bits of a float, read as an integer, are below its binary logarithm.
INLINE Lanes noise_bound(Words hash) {
  constexpr float kLog2 = 0.693147181f, kRounding = 1e-4f;
  const Lanes half = __builtin_convertvector((Ints)(hash >> 1), Lanes);  // 2^31 u, about
  const Lanes logarithm = __builtin_convertvector((Ints)half, Lanes);
  return (127 + 31) * kLog2 + kRounding - logarithm * (0x1p-23f * kLog2);
}

// tile[r][candidate] = sum over c of a[c][r] * b[c][candidate], always in the order of c, and in passed[r] a bit for
// each candidate that may be among the best of anchor row + r: the sieve, on sums that are still in registers. A NaN is
// never below the limit.
template <bool kDraws>
__attribute__((noinline)) void multiply_and_sieve(const Block& block, const float* a, const float* b, int64_t row,
                                                  int64_t candidate, float* tile, uint64_t* passed) {
  const int64_t columns = block.args.anchors.columns;
  Lanes sum[kRows][kVectors];
  multiply<kRows, kVectors>({a, 1, kRows}, b, kWidth, columns, sum);
  const float *floors = block.floor.data() + row, *limits = block.limit.data() + row;
  const float scale = block.args.inverse_temperature;
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    const Lanes floor = floors[r] - Lanes{}, limit = limits[r] - Lanes{};
    uint64_t bits = 0;
#pragma GCC unroll 32
    for (int t = 0; t < kVectors; ++t) {
      const Lanes score = sum[r][t];
      Lanes rank = score;
      if (kDraws) {
        Words key;
        __builtin_memcpy(&key, block.column_key.data() + candidate + t * kLanes, sizeof key);
        rank = score * scale + noise_bound(mix(key + block.row_key[row + r]));
      }
      bits |= passing(rank, floor, score, limit) << (t * kLanes);  // the floor is NaN at first
      store(tile + (r * kVectors + t) * kLanes, score);
    }
    passed[r] = bits;
  }
}

// x[kLanes - 1], y[0], y[1] ...
template <int... i>
INLINE Lanes shift(Lanes x, Lanes y, std::integer_sequence<int, i...>) {
#ifdef __clang__
  return Lanes{(i == 0 ? x : y)[i == 0 ? kLanes - 1 : i - 1]...};
#else
  return __builtin_shuffle(x, y, Ints{(kLanes - 1 + i)...});
#endif
}

// Puts a winner in its place among those of a row, which are sorted: each one that it beats moves up by one, the last
// one out.
void insert(Block& block, int64_t row, float rank, float score, int32_t index) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  float* ranks = block.ranks_of(row);
  const float values[] = {rank, score, bits_to_float(index)};
  for (int64_t i = (block.args.k - 1) / kLanes * kLanes; i >= 0; i -= kLanes) {
    const Lanes own = load(ranks + i), before = i == 0 ? Lanes{} + __builtin_inff() : load(ranks + i - kLanes);
    const Ints stays = own >= rank, moves = shift(before, own, lanes) < rank;
    float* to = ranks + i;
    for (const float value : values) {
      const Lanes moved = shift(i == 0 ? Lanes{} : load(to - kLanes), load(to), lanes);
      store(to, moves ? moved : stays ? load(to) : Lanes{} + value);
      to += block.row_size;
    }
    if (!moves[0]) break;
  }
}

// Inserts those pairs of a row of a tile that are among the best of their anchor so far, and raises its floor.
template <bool kDraws>
__attribute__((noinline)) void offer(Block& block, int64_t row, int64_t first_candidate, uint64_t passed,
                                     const float* scores) {
  const Args& args = block.args;
  const int64_t anchor_id = args.anchor_ids[block.first + row];
  const float* worst = block.ranks_of(row) + args.k - 1;
  for (; passed != 0; passed &= passed - 1) {
    const int lane = __builtin_ctzll(passed);
    const int64_t candidate = first_candidate + lane, index = block.run + candidate;
    float rank = scores[lane];
    if (kDraws) rank = rank / args.temperature + noise(mix(block.row_key[row] + block.column_key[candidate]));
    rank = rank > kLowest ? rank : kLowest;  // above -inf, which stands for no winner
    if (rank > *worst && args.candidate_ids[index] != anchor_id) insert(block, row, rank, scores[lane], index);
  }
  if (*worst >= kLowest) block.floor[row] = kDraws ? *worst - __builtin_fabsf(*worst) * 0x1p-19f - 1e-4f : *worst;
}

// All pairs of the packed anchors with `count` packed candidates.
template <bool kDraws>
INLINE void search_tiles(Block& block, const float* candidates, int64_t count) {
  const int64_t columns = block.args.anchors.columns;
  alignas(64) float tile[kRows * kWidth];
  uint64_t passed[kRows];
  for (int64_t i = 0; i < block.count; i += kRows) {
    for (int64_t j = 0; j < count; j += kWidth) {
      multiply_and_sieve<kDraws>(block, block.anchors + i * columns, candidates + j * columns, i, j, tile, passed);
      const uint64_t valid = ~uint64_t{0} >> (64 - (count - j < kWidth ? count - j : kWidth));
      for (int64_t r = 0; r < kRows; ++r) {
        if (passed[r] & valid) offer<kDraws>(block, i + r, j, passed[r] & valid, tile + r * kWidth);
      }
    }
  }
}

void search(Block& block, const float* candidates, int64_t count) {
  if (block.args.draws) {
    search_tiles<true>(block, candidates, count);
  } else {
    search_tiles<false>(block, candidates, count);
  }
}

const Kernels kernels{pack, search, insert, kRows, kWidth, kLanes};
