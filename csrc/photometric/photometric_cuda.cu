// photometric on the GPU, two kernels. A block per sample finds the mean gray that contrast needs, of samples that need it. A
// block per tile then reads its pixels (with a border, where the sample is blurred), applies the jitter, blurs them in shared
// memory, first along rows, in place, then along columns, and writes. Branches depend on the table only, so all threads of a
// block take the same.
#include <algorithm>
#include <vector>

#include "../device.h"
#include "arguments.h"
#include "pixel.h"

namespace patchlight {
namespace {

constexpr int kMeanThreads = 512, kTileThreads = 256;
constexpr int kTileHeight = 48, kTileWidth = 64;  // at most
constexpr int kAtOnce = 4;                      // pixels, or rows of the blur, that a thread computes at once
constexpr int kWeights = 32;                      // floats of shared memory in front of a tile

struct Pixels {
  float r[kAtOnce], g[kAtOnce], b[kAtOnce];

  __device__ __forceinline__ void read(int i, const uint8_t* bytes) { r[i] = bytes[0], g[i] = bytes[1], b[i] = bytes[2]; }
};

// The steps [from, to) of the jitter's order. `center` is the mean gray that contrast needs.
__device__ __forceinline__ void jitter(Pixels& p, const Settings& settings, int from, int to, float center) {
#pragma unroll 1
  for (int place = from; place < to; ++place) {
    const int kind = settings.kind(place);
    if (!settings.changes(kind)) continue;
    if (kind == kHue) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) shift_hue(p.r[i], p.g[i], p.b[i], settings.hue);
      continue;
    }
    const float factor = kind == kBrightness ? settings.brightness : kind == kContrast ? settings.contrast : settings.saturation;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float middle = kind == kBrightness ? 0.0f : kind == kContrast ? center : gray_of(p.r[i], p.g[i], p.b[i]);
      const float rest = middle * (1 - factor);
      p.r[i] = blend(p.r[i], factor, rest), p.g[i] = blend(p.g[i], factor, rest), p.b[i] = blend(p.b[i], factor, rest);
    }
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Of samples whose contrast changes: the mean gray of the picture at that step.
__global__ void __launch_bounds__(kMeanThreads) mean_kernel(const uint8_t* bytes, const float* table, float* means, int pixels) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int sample = int(blockIdx.x), thread = int(threadIdx.x);
  const Settings settings(table + int64_t(sample) * kTableColumns);
  const int contrast_at = settings.contrast_place();
  const uint8_t* own = bytes + int64_t(sample) * pixels * 3;
  if (contrast_at < 4) {  // the same for the whole block
    float sum = 0;
    for (int first = 0; first < pixels; first += kMeanThreads * kAtOnce) {
      Pixels p;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) p.read(i, own + min_int(first + i * kMeanThreads + thread, pixels - 1) * 3);
      jitter(p, settings, 0, contrast_at, 0);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        sum += first + i * kMeanThreads + thread < pixels ? gray_of(p.r[i], p.g[i], p.b[i]) : 0.0f;
    }
    sum = warp_sum(sum);
    if (thread % kWarpLanes == 0) sums[thread / kWarpLanes] = sum;
    __syncthreads();
    if (thread < kWarpLanes) {
      sum = warp_sum(thread < kMeanThreads / kWarpLanes ? sums[thread] : 0.0f);
      if (thread == 0) means[sample] = sum / float(pixels);
    }
  }
}

struct Tiles {
  int height, width;            // of a picture
  int tile_height, tile_width;  // of all tiles but the last ones
  int across, count;            // tiles in a row, and in a picture
};

// One tile of one sample, with its border.
template <class T>
struct Tile {
  const Settings& settings;
  const Normalization& normalization;
  T* out;  // of the sample
  int picture_height, picture_width, top, left, height, width, reach;

  __device__ __forceinline__ int rows() const { return height + 2 * reach; }
  __device__ __forceinline__ int pitch() const { return width + 2 * reach; }

  __device__ __forceinline__ void write(int y, int x, int channel, float value) const {
    const int at = (channel * picture_height + top + y) * picture_width + left + x;
    out[at] = T(solarized(value, settings.solarize) * normalization.scale[channel] + normalization.shift[channel]);
  }

  // Pixels with their border through the jitter; to `planes`, or to the output if there is no blur.
  __device__ __forceinline__ void change(const uint8_t* bytes, float center, float* planes) const {
    const int count = rows() * pitch(), plane = count;
    for (int first = int(threadIdx.x); first < count; first += kTileThreads * kAtOnce) {
      Pixels p;
      int y[kAtOnce], x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = min_int(first + i * kTileThreads, count - 1);
        y[i] = at / pitch(), x[i] = at - y[i] * pitch();
        const int row = mirrored(top + y[i] - reach, picture_height), column = mirrored(left + x[i] - reach, picture_width);
        p.read(i, bytes + (row * picture_width + column) * 3);
      }
      jitter(p, settings, 0, 4, center);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (settings.gray) p.r[i] = p.g[i] = p.b[i] = gray_of(p.r[i], p.g[i], p.b[i]);
        if (first + i * kTileThreads >= count) continue;
        const float values[3] = {p.r[i], p.g[i], p.b[i]};
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          if (reach == 0) write(y[i], x[i], c, values[c]);
          else planes[c * plane + y[i] * pitch() + x[i]] = values[c];
        }
      }
    }
  }

  // Along rows, in place: a warp owns a row, reads all of it and then writes its first `width` values.
  __device__ __forceinline__ void blur_rows(const float* weight, float* planes) const {
    const int lane = int(threadIdx.x) % kWarpLanes;
    for (int row = int(threadIdx.x) / kWarpLanes; row < 3 * rows(); row += kTileThreads / kWarpLanes) {
      float* values = planes + row * pitch();
      const int left_column = min_int(lane, width - 1), right_column = min_int(lane + kWarpLanes, width - 1);
      float left_sum = 0, right_sum = 0;
      for (int d = 0; d <= 2 * reach; ++d) {
        left_sum += weight[d] * values[left_column + d];
        right_sum += weight[d] * values[right_column + d];
      }
      __syncwarp();
      if (lane < width) values[lane] = left_sum;
      if (lane + kWarpLanes < width) values[lane + kWarpLanes] = right_sum;
    }
  }

  // Along columns: a thread sums four rows of one column in one pass.
  __device__ __forceinline__ void blur_columns(const float* weight, const float* planes) const {
    const int groups = (height + kAtOnce - 1) / kAtOnce;
    for (int item = int(threadIdx.x); item < groups * width; item += kTileThreads) {
      const int first = item / width * kAtOnce, column = item % width;
      float sum[3][kAtOnce] = {}, w[kAtOnce] = {};
      for (int k = 0; k < kAtOnce + 2 * reach; ++k) {
#pragma unroll
        for (int j = kAtOnce - 1; j > 0; --j) w[j] = w[j - 1];
        w[0] = k <= 2 * reach ? weight[k] : 0.0f;
        const float* values = planes + min_int(first + k, rows() - 1) * pitch() + column;
#pragma unroll
        for (int c = 0; c < 3; ++c)
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) sum[c][j] += w[j] * values[c * rows() * pitch()];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j < height)
#pragma unroll
          for (int c = 0; c < 3; ++c) write(first + j, column, c, sum[c][j]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, 3) tile_kernel(  // three blocks: for four, sm_100 would spill
    const uint8_t* bytes, const float* table, const float* means, T* out, Tiles tiles, Normalization normalization) {
  float* weight = reinterpret_cast<float*>(shared_memory());
  float* planes = weight + kWeights;
  const int sample = int(blockIdx.x) / tiles.count, number = int(blockIdx.x) % tiles.count;
  const int64_t offset = int64_t(sample) * tiles.height * tiles.width * 3;
  const Settings settings(table + int64_t(sample) * kTableColumns);
  const int top = number / tiles.across * tiles.tile_height, left = number % tiles.across * tiles.tile_width;
  const Tile<T> tile{
      settings, normalization, out + offset, tiles.height, tiles.width, top, left, min_int(tiles.tile_height, tiles.height - top),
      min_int(tiles.tile_width, tiles.width - left), settings.reach(min_int(tiles.height, tiles.width))};
  const int thread = int(threadIdx.x);
  if (thread <= 2 * tile.reach) {
    float sum = 0;
    for (int d = -tile.reach; d <= tile.reach; ++d) sum += blur_weight(d, settings.sigma);
    weight[thread] = blur_weight(thread - tile.reach, settings.sigma) / sum;
  }
  tile.change(bytes + offset, settings.contrast != 1 ? means[sample] : 0.0f, planes);
  if (tile.reach > 0) {  // the same for the whole block
    __syncthreads();
    tile.blur_rows(weight, planes);
    __syncthreads();
    tile.blur_columns(weight, planes);
  }
}

// Equal parts of at most `most`.
int part(int64_t size, int most) {
  const int64_t parts = (size + most - 1) / most;
  return int((size + parts - 1) / parts);
}

Tensor photometric_fwd(
    const Tensor& pixels, const Tensor& table, std::vector<double> mean, std::vector<double> std, ScalarType dtype) {
  check_arguments(pixels, table, mean, std);
  const int64_t samples = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  Tensor out = torch::stable::new_empty(pixels, {samples, 3, height, width}, dtype);
  Tensor means = torch::stable::new_empty(table, {samples});
  Tiles tiles{int(height), int(width), part(height, kTileHeight), part(width, kTileWidth), 0, 0};
  tiles.across = (tiles.width + tiles.tile_width - 1) / tiles.tile_width;
  tiles.count = tiles.across * ((tiles.height + tiles.tile_height - 1) / tiles.tile_height);
  STD_TORCH_CHECK(height * width < (int64_t(1) << 29) && samples * tiles.count < (int64_t(1) << 31),
                  "photometric: a picture must have less than 2^29 pixels and a call less than 2^31 tiles, got more; pass fewer samples.");
  const Normalization normalization(mean, std);
  const int64_t border = 2 * std::min<int64_t>(kMaxReach, std::min(height, width) - 1);
  const size_t shared = sizeof(float) * (kWeights + 3 * (tiles.tile_height + border) * (tiles.tile_width + border));
  const auto* bytes = static_cast<const uint8_t*>(pixels.data_ptr());
  const auto* rows = static_cast<const float*>(table.data_ptr());
  auto* centers = static_cast<float*>(means.data_ptr());
  const OnDevice device(pixels);
  launch(device, mean_kernel, dim3{unsigned(samples), 1, 1}, kMeanThreads, sizeof(float) * kMeanThreads / kWarpLanes, bytes, rows, centers,
         int(height * width));
  with_float_type(out, "photometric", [&](auto type) {
    using T = typename decltype(type)::type;
    launch(device, tile_kernel<T>, dim3{unsigned(samples * tiles.count), 1, 1}, kTileThreads, shared, bytes, rows,
           static_cast<const float*>(centers), static_cast<T*>(out.data_ptr()), tiles, normalization);
  });
  return out;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) { m.impl("photometric_fwd", TORCH_BOX(&patchlight::photometric_fwd)); }
