// block_masks on a CPU: a crop per task; the patches of the lowest keys are found without sorting the others.
#include <algorithm>
#include <vector>

#include "../native.h"
#include "draw.h"

namespace patchlight {
namespace {

// The numbers of the crops in the order of their random numbers.
std::vector<uint64_t> shuffled(uint64_t purpose, int64_t first, int64_t crops, int64_t batch) {
  std::vector<uint64_t> keys(crops);
  for (int64_t m = 0; m < crops; ++m) {
    const uint64_t bits = next_bits(bits_of_crop(purpose, first, m, batch), kCountKey);
    keys[m] = uint64_t(upper_bits(bits)) << 32 | uint64_t(m);
  }
  std::sort(keys.begin(), keys.end());
  for (uint64_t& key : keys) key &= 0xffffffffu;
  return keys;
}

void draw_mask(uint64_t crop, int count, const MaskGrid& grid, bool in_blocks, std::vector<uint64_t>& keys, bool* out) {
  const int patches = grid.patches();
  MaskBlock blocks[kBlocks];
  for (int b = 0; b < kBlocks && in_blocks; ++b) blocks[b] = draw_block(crop, b, count, grid);
  const uint64_t bits = next_bits(crop, kPatchKey);
  for (int n = 0; n < patches; ++n) keys[n] = in_blocks ? block_key(bits, n, blocks, grid) : random_key(bits, n);
  count = std::min(count, patches);
  if (count > 0 && count < patches) std::nth_element(keys.begin(), keys.begin() + count, keys.end());
  std::fill_n(out, patches, false);
  for (int i = 0; i < count; ++i) out[keys[i] & 0xffffffffu] = true;
}

Tensor block_masks_fwd(
    const Tensor& first, const Tensor& counts, int64_t seed, int64_t views, int64_t height, int64_t width, bool in_blocks) {
  const int64_t crops = counts.size(0), batch = crops / views;
  Tensor out = torch::stable::new_empty(counts, {views, batch, height * width}, ScalarType::Bool);
  const MaskGrid grid{int(height), int(width)};
  const auto* count = static_cast<const int32_t*>(counts.data_ptr());
  const int64_t image = *static_cast<const int64_t*>(first.data_ptr());
  const uint64_t purpose = next_bits(next_bits(0, uint64_t(seed)), kPurpose);
  auto* to = static_cast<bool*>(out.data_ptr());
  const std::vector<uint64_t> order = shuffled(purpose, image, crops, batch);
  torch::stable::parallel_for(0, crops, 8, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(grid.patches());
    for (int64_t m = begin; m < end; ++m) {
      draw_mask(bits_of_crop(purpose, image, m, batch), count[order[m]], grid, in_blocks, keys, to + m * grid.patches());
    }
  });
  return out;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) { m.impl("block_masks_fwd", TORCH_BOX(&patchlight::block_masks_fwd)); }
