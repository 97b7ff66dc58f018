// Vectors of floats for one instruction set, and rows of a matrix as floats. Included once for each set inside a
// namespace of its own (so no include guard) by what computes there, with SYNCMASK_LANES floats in a vector: the
// compiler splits vector types for the target in force where the code stands, not where it is inlined.

typedef float Lanes __attribute__((vector_size(4 * SYNCMASK_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * SYNCMASK_LANES)));
constexpr int kLanes = SYNCMASK_LANES;
#define INLINE inline __attribute__((always_inline))

INLINE Lanes load(const float* from) {
  Lanes x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float* to, Lanes x) { __builtin_memcpy(to, &x, sizeof x); }

INLINE Lanes higher(Lanes a, Lanes b) { return a > b ? a : b; }  // b where either is NaN

// exp(x) for x <= 0 to 1e-7 of its value, NaN for NaN, and 0 below e^-78 (1e-34): divided by a sum of up to
// thousands it would be a denormal number, which processors are slow with. After Cephes' expf.
INLINE Lanes exp_of_negative(Lanes x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Lanes shifted = x * 1.44269504088896341f + kRound;
  const Lanes n = shifted - kRound;
  const Lanes f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes y = f * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * (f * f) + f + 1.0f;
  const Ints power = ((Ints)shifted + 127) << 23;  // the integer in the low bits as an exponent
  return x < -78.0f ? Lanes{} : y * (Lanes)power;
}

// Elements of a0 b0 a1 b1 ...: of the lower halves, of the upper halves.
template <int... i>
INLINE void interleave(Lanes a, Lanes b, Lanes& low, Lanes& high, std::integer_sequence<int, i...>) {
#ifdef __clang__
  low = Lanes{(i % 2 ? b : a)[i / 2]...};
  high = Lanes{(i % 2 ? b : a)[(kLanes + i) / 2]...};
#else
  low = __builtin_shuffle(a, b, Ints{(i % 2 * kLanes + i / 2)...});
  high = __builtin_shuffle(a, b, Ints{(i % 2 * kLanes + (kLanes + i) / 2)...});
#endif
}

INLINE void interleave(Lanes a, Lanes b, Lanes& low, Lanes& high) {
  interleave(a, b, low, high, std::make_integer_sequence<int, kLanes>());
}

// x[i][j] becomes x[j][i].
INLINE void transpose(Lanes (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Lanes y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) interleave(x[i], x[i + kLanes / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(Bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
INLINE float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, shifted = magnitude << 13;
  const float finite = bits_to_float(shifted) * 0x1p112f;
  const float value = magnitude < 0x7c00u ? finite : bits_to_float(shifted | 0x7f800000u);
  return x.bits & 0x8000u ? -value : value;
}

template <typename T>
INLINE void convert(const Matrix& from, int64_t first, int64_t rows, float* to) {
  for (int64_t r = 0; r < rows; ++r, to += from.columns) {
    const T* row = static_cast<const T*>(from.data) + (first + r) * from.row_stride;
    if (from.column_stride == 1) {
      for (int64_t c = 0; c < from.columns; ++c) to[c] = to_float(row[c]);
    } else {
      for (int64_t c = 0; c < from.columns; ++c) to[c] = to_float(row[c * from.column_stride]);
    }
  }
}

struct Rows {
  const float* data;
  int64_t stride;
};

// Rows of a matrix as float32 with neighbouring elements: where they lie, or converted into `buffer`.
INLINE Rows read_rows(const Matrix& from, int64_t first, int64_t rows, float* buffer) {
  if (from.type == ScalarType::Float && from.column_stride == 1) {
    return {static_cast<const float*>(from.data) + first * from.row_stride, from.row_stride};
  }
  if (from.type == ScalarType::Float) convert<float>(from, first, rows, buffer);
  if (from.type == ScalarType::BFloat16) convert<Bfloat16>(from, first, rows, buffer);
  if (from.type == ScalarType::Half) convert<Float16>(from, first, rows, buffer);
  return {buffer, from.columns};
}

// to[c * stride + l] = element c of row l.
INLINE void interleave_rows(const float* const (&row)[kLanes], int64_t columns, int64_t stride, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Lanes x[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) x[l] = load(row[l] + c);
    transpose(x);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) store(to + (c + l) * stride, x[l]);
  }
  for (; c < columns; ++c) {
    for (int l = 0; l < kLanes; ++l) to[c * stride + l] = row[l][c];
  }
}
