// The meaning of a row of the table and its arithmetic for one pixel, for the CPU and the GPU. Columns as in table.py.
// Values lie between 0 and 255.
#pragma once

#include <cmath>
#include <cstdint>

#include "../host_device.h"

namespace patchlight {

constexpr int kTableColumns = 8;
constexpr int kMaxReach = 12;
constexpr float kMaxFactor = 1024.0f, kMaxHue = 0.5f, kBrightest = 255.0f;
constexpr int kBrightness = 0, kContrast = 1, kSaturation = 2, kHue = 3;

// Eight rows of the table of permutations of four, 8 bits each: two bits per place.
constexpr uint64_t packed_orders(int first_row) {
  uint64_t packed = 0;
  int row = 0;
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b)
      for (int c = 0; c < 4; ++c) {
        if (a == b || a == c || b == c) continue;
        if (row >= first_row && row < first_row + 8)
          packed |= uint64_t(a | b << 2 | c << 4 | (6 - a - b - c) << 6) << (8 * (row - first_row));
        ++row;
      }
  return packed;
}

// A row of the table: what is out of range (or NaN) changes nothing.
struct Settings {
  float brightness, contrast, saturation, hue, sigma, solarize;
  int kinds;  // two bits for each place in the order
  bool gray;

  PATCHLIGHT_HOST_DEVICE static float factor(float value) { return value >= 0 && value <= kMaxFactor ? value : 1.0f; }

  PATCHLIGHT_HOST_DEVICE explicit Settings(const float* row)
      : brightness(factor(row[0])), contrast(factor(row[1])), saturation(factor(row[2])),
        hue(row[3] >= -kMaxHue && row[3] <= kMaxHue ? row[3] : 0.0f), sigma(row[6]), solarize(row[7]), gray(row[5] > 0) {
    constexpr uint64_t kFirst = packed_orders(0), kSecond = packed_orders(8), kThird = packed_orders(16);
    const int order = row[4] >= 0 && row[4] < 24 ? int(row[4]) : 0;
    kinds = int((order < 8 ? kFirst : order < 16 ? kSecond : kThird) >> (order % 8 * 8)) & 255;
  }

  PATCHLIGHT_HOST_DEVICE int kind(int place) const { return kinds >> (2 * place) & 3; }
  PATCHLIGHT_HOST_DEVICE bool changes(int kind) const {
    return kind == kBrightness ? brightness != 1 : kind == kContrast ? contrast != 1 : kind == kSaturation ? saturation != 1 : hue != 0;
  }
  // The place of contrast in the order; 4 if it changes nothing.
  PATCHLIGHT_HOST_DEVICE int contrast_place() const {
    int place = 0;
    while (kind(place) != kContrast) ++place;
    return contrast != 1 ? place : 4;
  }
  // How many pixels to each side the blur of a picture reads; `side` is its shorter side.
  PATCHLIGHT_HOST_DEVICE int reach(int64_t side) const {
    if (!(sigma > 0)) return 0;
    const float three_sigmas = ceilf(3.0f * sigma);
    const float limit = side - 1 < kMaxReach ? float(side - 1) : float(kMaxReach);
    return int(three_sigmas < limit ? three_sigmas : limit);
  }
};

PATCHLIGHT_HOST_DEVICE float clamp_to(float x, float most) { return x < 0 ? 0.0f : x > most ? most : x; }
PATCHLIGHT_HOST_DEVICE float gray_of(float r, float g, float b) { return 0.2989f * r + 0.587f * g + 0.114f * b; }
PATCHLIGHT_HOST_DEVICE float blend(float x, float factor, float rest) { return clamp_to(x * factor + rest, kBrightest); }

// Shifts the hue of the HSV cone by `turns` of the color circle: with the hue in sextants, channels are least + chroma * (|h - 3| - 1, 2 - |h - 2|, 2 - |h - 4|).
PATCHLIGHT_HOST_DEVICE void shift_hue(float& r, float& g, float& b, float turns) {
  const float upper = r > g ? r : g, lower = r < g ? r : g;
  const float most = upper > b ? upper : b, least = lower < b ? lower : b;
  const float chroma = most - least;
  const float scale = 1.0f / (chroma > 0 ? chroma : 1.0f);  // 1 for a gray pixel, where it multiplies zeros
  float h = most == r ? (g - b) * scale : most == g ? (b - r) * scale + 2 : (r - g) * scale + 4;
  h += 6 * turns;  // -4..8
  h += h < 0 ? 6.0f : 0.0f;
  h -= h >= 6 ? 6.0f : 0.0f;
  r = least + chroma * clamp_to(fabsf(h - 3) - 1, 1.0f);
  g = least + chroma * clamp_to(2 - fabsf(h - 2), 1.0f);
  b = least + chroma * clamp_to(2 - fabsf(h - 4), 1.0f);
}

PATCHLIGHT_HOST_DEVICE float solarized(float x, float from) { return x >= from ? kBrightest - x : x; }

// The weight of a distance, not yet divided by the sum of all.
PATCHLIGHT_HOST_DEVICE float blur_weight(int distance, float sigma) {
  const float z = float(distance) / sigma;
  return expf(-0.5f * (z * z));
}

// The position in 0..size-1 that mirrors this one without repeating the edge; it may be up to size - 1 outside.
template <class Int>
PATCHLIGHT_HOST_DEVICE Int mirrored(Int at, Int size) {
  at = at < 0 ? -at : at;
  return at < size ? at : 2 * (size - 1) - at;
}

}  // namespace patchlight
