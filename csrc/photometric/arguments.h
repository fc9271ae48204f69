// What both implementations of photometric make of their arguments.
#pragma once
#include <vector>

#include "../native.h"
#include "pixel.h"

namespace patchlight {

inline void check_arguments(const Tensor& pixels, const Tensor& table, const std::vector<double>& mean, const std::vector<double>& std) {
  STD_TORCH_CHECK(pixels.dim() == 4 && pixels.is_contiguous() && table.is_contiguous() && pixels.size(3) == 3 &&
                      table.size(1) == kLookColumns && mean.size() == 3 && std.size() == 3,
                  "photometric: expected dense pixels [samples, height, width, 3] and a dense table; call the Python function");
}

// 0..255 to normalized values, channel by channel.
struct Normalization {
  float scale[3], shift[3];

  Normalization(const std::vector<double>& mean, const std::vector<double>& std) {
    for (int c = 0; c < 3; ++c) scale[c] = float(1 / (kBrightest * std[c])), shift[c] = float(-mean[c] / std[c]);
  }
};

}  // namespace patchlight
