// photometric on the CPU. A task is one sample. Strips of pixels that fit L1 go through the jitter, up to contrast if there is
// any, as that needs the mean of the whole picture; then through the rest. A blurred row is a weighted sum of rows, then of its
// own shifts, and is written to the output.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../native.h"
#include "../simd.h"
#include "arguments.h"
#include "pixel.h"

namespace patchlight {
namespace {

constexpr int64_t kStrip = 1024;  // pixels
constexpr int kDistancesAtOnce = 3;  // that one sweep of the blur adds

// Red, green and blue of adjacent pixels.
struct Strip {
  float *r, *g, *b;
  int64_t count;
};

CLONES void read_bytes(const uint8_t* __restrict pixels, float* __restrict r, float* __restrict g, float* __restrict b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) r[i] = pixels[3 * i], g[i] = pixels[3 * i + 1], b[i] = pixels[3 * i + 2];
}

// x * factor + rest, within 0..255.
CLONES void blend_plane(float* x, int64_t count, float factor, float rest) {
  for (int64_t i = 0; i < count; ++i) x[i] = blend(x[i], factor, rest);
}

CLONES void saturate(float* __restrict r, float* __restrict g, float* __restrict b, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) {
    const float rest = gray_of(r[i], g[i], b[i]) * (1 - factor);
    r[i] = blend(r[i], factor, rest), g[i] = blend(g[i], factor, rest), b[i] = blend(b[i], factor, rest);
  }
}

CLONES void shift_hues(float* __restrict r, float* __restrict g, float* __restrict b, int64_t count, float turns) {
  for (int64_t i = 0; i < count; ++i) shift_hue(r[i], g[i], b[i], turns);
}

CLONES float gray_sum(const float* r, const float* g, const float* b, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += gray_of(r[i], g[i], b[i]);
  return sum;
}

CLONES void make_gray(float* __restrict r, float* __restrict g, float* __restrict b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) r[i] = g[i] = b[i] = gray_of(r[i], g[i], b[i]);
}

CLONES void solarize_and_normalize(const float* __restrict x, float* __restrict y, int64_t count, float from, float scale, float shift) {
  for (int64_t i = 0; i < count; ++i) y[i] = solarized(x[i], from) * scale + shift;
}

// y = center * weight[0], or y as it is, + (before[d] + after[d]) * weight[d] for three distances.
CLONES void add_neighbors(
    const float* center, const float* const* before, const float* const* after, const float* weight, bool first, float* __restrict y,
    int64_t count) {
  const float *b1 = before[0], *b2 = before[1], *b3 = before[2], *a1 = after[0], *a2 = after[1], *a3 = after[2];
  const float w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
  if (first)
    for (int64_t i = 0; i < count; ++i) y[i] = w0 * center[i] + w1 * (b1[i] + a1[i]) + w2 * (b2[i] + a2[i]) + w3 * (b3[i] + a3[i]);
  else
    for (int64_t i = 0; i < count; ++i) y[i] += w1 * (b1[i] + a1[i]) + w2 * (b2[i] + a2[i]) + w3 * (b3[i] + a3[i]);
}

// The steps [from, to) of the jitter's order. `center` is the mean gray that contrast needs.
void jitter(const Strip& s, const Settings& settings, int from, int to, float center) {
  for (int place = from; place < to; ++place) {
    const int kind = settings.kind(place);
    if (!settings.changes(kind)) continue;
    if (kind == kSaturation) {
      saturate(s.r, s.g, s.b, s.count, settings.saturation);
    } else if (kind == kHue) {
      shift_hues(s.r, s.g, s.b, s.count, settings.hue);
    } else {
      const float factor = kind == kBrightness ? settings.brightness : settings.contrast;
      const float rest = kind == kBrightness ? 0.0f : center * (1 - factor);
      for (float* plane : {s.r, s.g, s.b}) blend_plane(plane, s.count, factor, rest);
    }
  }
}

// Half a kernel: weight[d] of distance d, padded with zeros to whole sweeps.
struct Kernel {
  int reach;
  float weight[1 + kMaxReach + kDistancesAtOnce] = {};

  Kernel(const Settings& settings, int64_t side) : reach(settings.reach(side)) {
    float sum = 0;
    for (int d = 0; d <= reach; ++d) sum += (d ? 2 : 1) * (weight[d] = blur_weight(d, settings.sigma));
    for (int d = 0; d <= reach; ++d) weight[d] /= sum;
  }

  // y[i] = sum over distances d of weight[d] (at(-d)[i] + at(d)[i]); at(d) is a row of values.
  template <class At>
  void apply(At at, float* y, int64_t count) const {
    const float *before[kDistancesAtOnce], *after[kDistancesAtOnce];
    for (int first = 1; first <= std::max(reach, 1); first += kDistancesAtOnce) {
      for (int t = 0; t < kDistancesAtOnce; ++t) {
        const int d = std::min(first + t, reach);  // behind the reach the weight is zero
        before[t] = at(-d), after[t] = at(d);
      }
      const float weights[1 + kDistancesAtOnce] = {weight[0], weight[first], weight[first + 1], weight[first + 2]};
      add_neighbors(at(0), before, after, weights, first == 1, y, count);
    }
  }
};

// The buffers of one thread.
struct Workspace {
  std::vector<float> planes, padded, line, normalized;
  Workspace(int64_t pixels, int64_t width)
      : planes(3 * pixels), padded(width + 2 * kMaxReach), line(width), normalized(std::max(width, kStrip)) {}
};

struct Sample {
  int64_t height, width;
  Normalization normalization;

  int64_t pixels() const { return height * width; }
  Strip strip(Workspace& work, int64_t at) const {
    float* r = work.planes.data() + at;
    return {r, r + pixels(), r + 2 * pixels(), std::min(kStrip, pixels() - at)};
  }

  template <class T>
  void change(const uint8_t* bytes, const Settings& settings, T* out, Workspace& work) const {
    const int contrast_at = settings.contrast_place();
    double sum = 0;
    for (int64_t at = 0; at < pixels(); at += kStrip) {
      const Strip s = strip(work, at);
      read_bytes(bytes + 3 * at, s.r, s.g, s.b, s.count);
      jitter(s, settings, 0, contrast_at, 0);
      if (contrast_at < 4) sum += gray_sum(s.r, s.g, s.b, s.count);
      else finish(s, at, settings, out, work);
    }
    const float center = float(sum / double(pixels()));
    for (int64_t at = 0; at < pixels() && contrast_at < 4; at += kStrip) {
      const Strip s = strip(work, at);
      jitter(s, settings, contrast_at, 4, center);
      finish(s, at, settings, out, work);
    }
    if (settings.sigma > 0) blur(settings, out, work);
  }

  // The steps after the jitter, up to the blur if there is one.
  template <class T>
  void finish(const Strip& s, int64_t at, const Settings& settings, T* out, Workspace& work) const {
    if (settings.gray) make_gray(s.r, s.g, s.b, s.count);
    if (settings.sigma > 0) return;
    const float* planes[3] = {s.r, s.g, s.b};
    for (int c = 0; c < 3; ++c) write(planes[c], s.count, c, settings, out + c * pixels() + at, work);
  }

  template <class T>
  void blur(const Settings& settings, T* out, Workspace& work) const {
    const Kernel kernel(settings, std::min(height, width));
    float* middle = work.padded.data() + kMaxReach;
    const int distinct = settings.gray ? 1 : 3;  // channels to blur
    for (int first = 0; first < distinct; ++first) {
      const float* plane = work.planes.data() + first * pixels();
      for (int64_t y = 0; y < height; ++y) {
        kernel.apply([&](int d) { return plane + mirrored(y + d, height) * width; }, middle, width);
        for (int d = 1; d <= kernel.reach; ++d) middle[-d] = middle[d], middle[width - 1 + d] = middle[width - 1 - d];
        kernel.apply([&](int d) { return middle + d; }, work.line.data(), width);
        for (int c = first; c < 3; c += distinct) write(work.line.data(), width, c, settings, out + c * pixels() + y * width, work);
      }
    }
  }

  template <class T>
  void write(const float* x, int64_t count, int channel, const Settings& settings, T* out, Workspace& work) const {
    const float scale = normalization.scale[channel], shift = normalization.shift[channel];
    if constexpr (std::is_same_v<T, float>) {
      solarize_and_normalize(x, out, count, settings.solarize, scale, shift);
    } else {
      solarize_and_normalize(x, work.normalized.data(), count, settings.solarize, scale, shift);
      narrow(work.normalized.data(), out, count);
    }
  }
};

Tensor photometric_fwd(
    const Tensor& pixels, const Tensor& table, std::vector<double> mean, std::vector<double> std, ScalarType dtype) {
  check_arguments(pixels, table, mean, std);
  const int64_t samples = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  Tensor out = torch::stable::new_empty(pixels, {samples, 3, height, width}, dtype);
  const Sample sample{height, width, Normalization(mean, std)};
  const auto* bytes = static_cast<const uint8_t*>(pixels.data_ptr());
  const auto* rows = static_cast<const float*>(table.data_ptr());
  with_float_type(out, "photometric", [&](auto type) {
    using T = typename decltype(type)::type;
    auto* to = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      Workspace work(sample.pixels(), width);
      for (int64_t m = begin; m < end; ++m) {
        const int64_t at = m * sample.pixels() * 3;
        sample.change(bytes + at, Settings(rows + m * kTableColumns), to + at, work);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) { m.impl("photometric_fwd", TORCH_BOX(&patchlight::photometric_fwd)); }
