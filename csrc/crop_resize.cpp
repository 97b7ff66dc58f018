// The CPU kernel of syncmask::crop_resize; kernels/crop_resize.py has the definition and the schema.
//
// A decoded image becomes a row of a batch in one pass: crop, antialiased bilinear resize, flip, color changes and
// normalization. Nothing but a band of a few output rows is kept in between, and no memory is taken from call to call.
//
// Letters: H, W height and width of the image; S of the output.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "strided.h"

namespace {

using namespace syncmask;
using torch::stable::Tensor;

constexpr int64_t kWidestLanes = 16;
constexpr int64_t kLargestSide = 1 << 16;  // of a crop and of the output: bounds the memory of a thread

// The crop of an image: 3 interleaved bytes a pixel, rows `stride` bytes apart.
struct Crop {
  const uint8_t* data;
  int64_t stride, width;
  bool flip;
};

// out = scale * clamp(round(own * x + grey * grey level + offset)) + shift; without change, scale * x + shift.
struct ColorChange {
  bool change;
  float own, grey, offset;
  const float *scale, *shift;
};

// Which pixels of a line become an output pixel: `taps` of them from `first` on, and how much of each.
struct Window {
  void resize(int64_t from, int64_t to);

  int64_t taps;
  std::vector<int64_t> first;  // [to, filled up to whole vectors with the last]
  std::vector<float> weights;  // [as many, taps]
};

// The triangle filter of Pillow and torchvision: pixel centers are halves, a downscaled pixel reaches as far as it is
// large, and what would be beyond the line is left out.
void Window::resize(int64_t from, int64_t to) {
  const double scale = static_cast<double>(from) / to, reach = std::max(scale, 1.0), inverse = 1 / reach;
  const int64_t padded = (to + kWidestLanes - 1) / kWidestLanes * kWidestLanes;
  const auto begin_of = [&](double center) { return std::max<int64_t>(static_cast<int64_t>(center - reach + 0.5), 0); };
  const auto end_of = [&](double center) {
    return std::min<int64_t>(static_cast<int64_t>(center + reach + 0.5), from);
  };
  taps = 1;
  for (int64_t i = 0; i < to; ++i) taps = std::max(taps, end_of((i + 0.5) * scale) - begin_of((i + 0.5) * scale));
  first.resize(padded);
  weights.resize(padded * taps);
  for (int64_t i = 0; i < padded; ++i) {
    const double center = (std::min(i, to - 1) + 0.5) * scale;
    const int64_t begin = begin_of(center), end = end_of(center);
    first[i] = std::min(begin, from - taps);
    float* row = weights.data() + i * taps;
    double sum = 0;
    for (int64_t j = begin; j < end; ++j) sum += std::max(0.0, 1 - std::abs(j + 0.5 - center) * inverse);
    const double share = 1 / sum;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t j = first[i] + t;
      row[t] = j < begin || j >= end
                   ? 0
                   : static_cast<float>(share * std::max(0.0, 1 - std::abs(j + 0.5 - center) * inverse));
    }
  }
}

struct Kernels {
  void (*run)(const Crop& crop, const Window& across, const Window& down, const ColorChange& color_change, int64_t size,
              float* band, float* strip, float* out);
};

}  // namespace

#define SYNCMASK_KERNEL "crop_resize_kernel.inl"
#include "isa.h"

namespace {

const float* levels_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == 3 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "crop_resize: scale and shift must be contiguous float32 [3]");
  return static_cast<const float*>(x.const_data_ptr());
}

void crop_resize(Tensor image, int64_t x, int64_t y, int64_t width, int64_t height, bool flip, double brightness,
                 double contrast, double saturation, Tensor scale, Tensor shift, Tensor out) {
  STD_TORCH_CHECK(
      image.dim() == 3 && image.size(2) == 3 && image.scalar_type() == ScalarType::Byte && image.is_contiguous(),
      "crop_resize: image must be contiguous uint8 [H, W, 3]");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == 3 && out.size(1) == out.size(2) && out.size(1) >= 1 &&
                      out.scalar_type() == ScalarType::Float && out.is_contiguous(),
                  "crop_resize: out must be contiguous float32 [3, S, S]");
  const int64_t rows = image.size(0), columns = image.size(1), size = out.size(1);
  STD_TORCH_CHECK(x >= 0 && y >= 0 && width >= 1 && height >= 1 && width <= columns && height <= rows &&
                      x <= columns - width && y <= rows - height,
                  "crop_resize: the crop of ", width, " x ", height, " at (", x, ", ", y,
                  ") is not within the image of ", columns, " x ", rows);
  STD_TORCH_CHECK(std::max({width, height, size}) <= kLargestSide, "crop_resize: more than ", kLargestSide,
                  " pixels in a line");

  const float b = static_cast<float>(brightness), c = static_cast<float>(contrast), s = static_cast<float>(saturation);
  const ColorChange color_change{b != 1 || c != 1 || s != 1, b * c * s,        b * c * (1 - s),
                                 b * (1 - c) * 128,          levels_of(scale), levels_of(shift)};
  const uint8_t* data = static_cast<const uint8_t*>(image.const_data_ptr());
  const Crop crop{data + 3 * (y * columns + x), 3 * columns, width, flip};
  thread_local Window across, down;
  thread_local AlignedBuffer<float> band, strip;
  across.resize(width, size);
  down.resize(height, size);
  band.resize((3 * width + kWidestLanes) * kWidestLanes);
  strip.resize(3 * size * kWidestLanes);
  kernels().run(crop, across, down, color_change, size, band.data(), strip.data(),
                static_cast<float*>(out.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, m) { m.impl("crop_resize", TORCH_BOX(&crop_resize)); }
