// Vectors of floats for one instruction set, rows of a matrix as floats, and products in registers. Each *_kernel.inl
// includes it inside the namespace of its instruction set (so there is no include guard), with SYNCMASK_LANES floats in
// a vector: the compiler splits vector types for the target at the place of the code, not where it is inlined.

typedef float Lanes __attribute__((vector_size(4 * SYNCMASK_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * SYNCMASK_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * SYNCMASK_LANES)));
constexpr int kLanes = SYNCMASK_LANES;

template <typename Vector = Lanes, typename Element>
INLINE Vector load(const Element* from) {
  Vector x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <typename Vector, typename Element>
INLINE void store(Element* to, Vector x) {
  __builtin_memcpy(to, &x, sizeof x);
}

template <typename Vector>
INLINE Vector higher(Vector a, Vector b) {  // b where either is NaN
  return a > b ? a : b;
}

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
template <typename Vector, int... i>
INLINE void interleave(Vector a, Vector b, Vector& low, Vector& high, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
#ifdef __clang__
  low = Vector{(i % 2 ? b : a)[i / 2]...};
  high = Vector{(i % 2 ? b : a)[(n + i) / 2]...};
#else
  typedef decltype(a > b) Order;
  low = __builtin_shuffle(a, b, Order{(i % 2 * n + i / 2)...});
  high = __builtin_shuffle(a, b, Order{(i % 2 * n + (n + i) / 2)...});
#endif
}

template <typename Vector>
INLINE void interleave(Vector a, Vector b, Vector& low, Vector& high) {
  interleave(a, b, low, high, std::make_integer_sequence<int, sizeof(Vector) / sizeof(a[0])>());
}

// x[i][j] becomes x[j][i], for as many vectors as a vector has elements.
template <typename Vector, int n>
INLINE void transpose(Vector (&x)[n]) {
  static_assert(n * sizeof(x[0][0]) == sizeof(Vector), "a square");
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    Vector y[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) interleave(x[i], x[i + n / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
}

// `a` of a product: element (i, t) is data[i * row + t * term].
struct Factor {
  const float* data;
  int64_t row, term;
};

// sum[i][v] = the sum over t < terms of a(i, t) times vector v of row t of b, in the order of t. The sums must fit the
// registers: this is the loop in which the operators spend their time.
template <int R, int V>
INLINE void multiply(Factor a, const float* b, int64_t b_stride, int64_t terms, Lanes (&sum)[R][V]) {
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) sum[i][v] = Lanes{};
  }
  for (int64_t t = 0; t < terms; ++t) {
    Lanes x[V];
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) x[v] = load(b + t * b_stride + v * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      const float y = a.data[i * a.row + t * a.term];
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[i][v] += x[v] * y;
    }
  }
}

// A bit for each lane that holds -1 (the others hold 0).
INLINE uint32_t bits_of(Ints mask) {
#if SYNCMASK_LANES == 16
  return _mm512_movepi32_mask((__m512i)mask);
#elif SYNCMASK_LANES == 8
  return _mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(mask[l] & 1) << l;
  return bits;
#endif
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

// Rows of a matrix as float32 with adjacent elements: in place, or converted into `buffer`.
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
