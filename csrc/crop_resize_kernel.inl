// The pixels of crop_resize. Lane l of a vector is row l of a band of kLanes output rows: neighboring columns are then
// neighboring vectors, and neither direction of the resize has to gather.

#include "simd.h"

// `count` bytes (at most kLanes are read) as floats; lanes beyond are 0.
INLINE Lanes load_bytes(const uint8_t* from, int64_t count) {
  uint8_t padded[kLanes] = {};
  if (count < kLanes) {
    __builtin_memcpy(padded, from, count);
    from = padded;
  }
#if SYNCMASK_LANES == 16
  return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif SYNCMASK_LANES == 8
  return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Lanes x;
  for (int l = 0; l < kLanes; ++l) x[l] = from[l];
  return x;
#endif
}

// Of one tile of a band: to[e][l] = element e of row l, for kLanes elements of a row, of which `count` exist.
INLINE void blend_tile(const uint8_t* image, int64_t stride, const Window& window, int64_t y, int64_t count,
                       float* to) {
  Lanes rows[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const uint8_t* from = image + window.first[y + l] * stride;
    const float* weights = window.weights.data() + (y + l) * window.taps;
    Lanes sum = weights[0] * load_bytes(from, count);
    for (int64_t t = 1; t < window.taps; ++t) sum += weights[t] * load_bytes(from + t * stride, count);
    rows[l] = sum;
  }
  transpose(rows);
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) store(to + l * kLanes, rows[l]);
}

// Whole levels; halves to even, as rint rounds them.
INLINE Lanes to_levels(Lanes x) {
  constexpr float kOnesOnly = 0x1.8p23f;  // above it a float has no bits for fractions
  return (x + kOnesOnly) - kOnesOnly;
}

INLINE Lanes clamp_levels(Lanes x) {
  const Lanes least = {}, most = least + 255.0f;
  x = x < least ? least : x;
  return x > most ? most : x;
}

// band: room for kLanes rows of the crop, [elements, kLanes].     strip: for kLanes rows of the output, which then go
// to `out` in one piece for each color: memory takes many short pieces more slowly.
void crop_resize(const Crop& crop, const Window& across, const Window& down, const ColorChange& color_change,
                 int64_t size, float* band, float* strip, float* out) {
  const int64_t elements = 3 * crop.width;
  for (int64_t y = 0; y < size; y += kLanes) {
    const int64_t rows = size - y < kLanes ? size - y : kLanes;
    for (int64_t e = 0; e < elements; e += kLanes) {
      const int64_t left = elements - e;
      if (left >= kLanes) {
        blend_tile(crop.data + e, crop.stride, down, y, kLanes, band + e * kLanes);
      } else {
        blend_tile(crop.data + e, crop.stride, down, y, left, band + e * kLanes);
      }
    }
    for (int64_t x = 0; x < size; x += kLanes) {
      const int64_t columns = size - x < kLanes ? size - x : kLanes;
      Lanes pixels[3][kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t column = l < columns ? x + l : size - 1, source = crop.flip ? size - 1 - column : column;
        const float* from = band + across.first[source] * 3 * kLanes;
        const float* weights = across.weights.data() + source * across.taps;
        Lanes sums[3] = {};
        for (int64_t t = 0; t < across.taps; ++t, from += 3 * kLanes) {
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) sums[c] += weights[t] * load(from + c * kLanes);
        }
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) sums[c] = to_levels(sums[c]);
        if (color_change.change) {
          const Lanes grey =
              color_change.offset + color_change.grey * (0.299f * sums[0] + 0.587f * sums[1] + 0.114f * sums[2]);
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) sums[c] = clamp_levels(to_levels(color_change.own * sums[c] + grey));
        }
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) pixels[c][l] = color_change.scale[c] * sums[c] + color_change.shift[c];
      }
      for (int c = 0; c < 3; ++c) {
        transpose(pixels[c]);
        float* to = strip + c * kLanes * size + x;
        if (columns == kLanes) {
#pragma GCC unroll 16
          for (int64_t l = 0; l < kLanes; ++l) store(to + l * size, pixels[c][l]);
        } else {
          for (int64_t l = 0; l < kLanes; ++l) __builtin_memcpy(to + l * size, &pixels[c][l], columns * sizeof(float));
        }
      }
    }
    for (int c = 0; c < 3; ++c) {
      __builtin_memcpy(out + (c * size + y) * size, strip + c * kLanes * size, rows * size * sizeof(float));
    }
  }
}

const Kernels kernels{crop_resize};
