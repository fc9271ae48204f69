// Checks and constants that the C++ and the CUDA implementation of photometric share.
#pragma once
#include <vector>

#include "../native.h"
#include "pixel.h"

namespace patchlight {

inline void check_arguments(const Tensor& pixels, const Tensor& table, const std::vector<double>& mean, const std::vector<double>& std) {
  STD_TORCH_CHECK(pixels.dim() == 4 && pixels.is_contiguous() && table.is_contiguous() && pixels.size(3) == 3 &&
                      table.size(1) == kTableColumns && mean.size() == 3 && std.size() == 3,
                  "photometric: pixels must be [samples, height, width, 3], dense like the table, got another layout; call the Python function.");
}

// From 0..255 to normalized values, per channel.
struct Normalization {
  float scale[3], shift[3];

  Normalization(const std::vector<double>& mean, const std::vector<double>& std) {
    for (int c = 0; c < 3; ++c) scale[c] = float(1 / (kBrightest * std[c])), shift[c] = float(-mean[c] / std[c]);
  }
};

}  // namespace patchlight
