// The random numbers of block_masks and the geometry of its blocks, for the CPU and the GPU. Constants as in reference.py.
//
// Every result is the same on every device: products of floats are computed in double, where they are exact, and rounded
// once, so no compiler can fuse them with a sum.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PATCHLIGHT_DRAW __host__ __device__ __forceinline__
#else
#define PATCHLIGHT_DRAW inline
#endif

namespace patchlight {

constexpr int kBlocks = 8;
constexpr uint64_t kPurpose = 0x6D61736B, kCountKey = 0, kPatchKey = 1, kBlockKey = 2;
constexpr float kWidest = 1.2039728043259361f;  // -log(0.3)
constexpr float kTie = 0.2f;

PATCHLIGHT_DRAW uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Random bits for one more key.
PATCHLIGHT_DRAW uint64_t next_bits(uint64_t bits, uint64_t key) {
  constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
  return mix_bits((bits + golden) ^ mix_bits(key + golden));
}

// Random bits of a crop, from which all its numbers are drawn.
PATCHLIGHT_DRAW uint64_t bits_of_crop(uint64_t purpose, int64_t first, int64_t crop, int64_t batch) {
  return next_bits(0, next_bits(next_bits(purpose, uint64_t(first + crop % batch)), uint64_t(crop / batch)));
}

PATCHLIGHT_DRAW uint32_t upper_bits(uint64_t bits) { return uint32_t(bits >> 40); }
PATCHLIGHT_DRAW float uniform(uint64_t bits) { return float(upper_bits(bits)) / 16777216.0f; }
PATCHLIGHT_DRAW float product(float a, float b) { return float(double(a) * double(b)); }

struct MaskGrid {
  int height, width;
  PATCHLIGHT_DRAW int patches() const { return height * width; }
  PATCHLIGHT_DRAW int far4() const { return 4 * (height * height + width * width); }  // above any distance4
};

struct MaskBlock {
  int top, left, height, width;

  // Four times the squared distance of a patch from the middle, an integer.
  PATCHLIGHT_DRAW int distance4(int y, int x) const {
    const int row = 2 * (y - top) - (height - 1), column = 2 * (x - left) - (width - 1);
    return row * row + column * column;
  }
  PATCHLIGHT_DRAW bool has(int y, int x) const { return y >= top && y < top + height && x >= left && x < left + width; }
};

// A block's length along one axis, at least 1 and below the grid's.
PATCHLIGHT_DRAW int side(double area, int cells) {
  const float length = rintf(float(sqrt(double(float(area)))));
  const int most = cells > 2 ? cells - 1 : 1;
  return length < 1 ? 1 : length > float(most) ? most : int(length);
}

PATCHLIGHT_DRAW MaskBlock draw_block(uint64_t crop, int number, int count, const MaskGrid& grid) {
  const uint64_t bits = next_bits(crop, kBlockKey);
  const auto draw = [&](int kind) { return uniform(next_bits(bits, kind * kBlocks + number)); };
  const int third = (grid.height < grid.width ? grid.height : grid.width) / 3;
  const float smallest = float(third * third);
  const float area = smallest + product(draw(0), float(count) - smallest);
  const double aspect = double(float(exp(double(product(2 * draw(1) - 1, kWidest)))));
  MaskBlock block;
  block.height = side(double(area) * aspect, grid.height);
  block.width = side(double(area) / aspect, grid.width);
  block.top = int(product(draw(2), float(grid.height - block.height + 1)));
  block.left = int(product(draw(3), float(grid.width - block.width + 1)));
  return block;
}

// A number that orders the patches of a crop, and ties go to the lower patch: in blocks, or at random.
PATCHLIGHT_DRAW uint64_t random_key(uint64_t crop_patch_bits, int patch) {
  return uint64_t(upper_bits(next_bits(crop_patch_bits, patch))) << 32 | uint32_t(patch);
}

PATCHLIGHT_DRAW uint64_t block_key(uint64_t crop_patch_bits, int patch, const MaskBlock* blocks, const MaskGrid& grid) {
  const int y = patch / grid.width, x = patch % grid.width;
  int order4 = kBlocks * grid.far4() + blocks[0].distance4(y, x);  // if all blocks are too small, the first one grows
  for (int b = kBlocks - 1; b >= 0; --b)
    if (blocks[b].has(y, x)) order4 = b * grid.far4() + blocks[b].distance4(y, x);
  // The random part only breaks ties.
  const float order = 0.25f * float(order4) + product(kTie, uniform(next_bits(crop_patch_bits, patch)));
  uint32_t code;
  memcpy(&code, &order, sizeof code);  // as no order is negative, it is ordered like the number
  return uint64_t(code) << 32 | uint32_t(patch);
}

}  // namespace patchlight
