// block_masks on the GPU, one launch: a block of threads for each crop. Every warp finds the n-th smallest key by itself, bit by
// bit from above, so the threads wait for one another only after keys are written.
#include "../device.h"
#include "draw.h"

namespace patchlight {
namespace {

constexpr int kThreads = 128;

// The n-th smallest of `number` different keys below 2^bits, the same in all lanes of the warp; 0 for n = 0.
template <class Key>
__device__ uint64_t nth_smallest(int n, int bits, int number, Key key) {
  uint64_t found = 0;
  for (int bit = bits - 1; bit >= 0; --bit) {
    const uint64_t trial = found | uint64_t(1) << bit;
    int below = 0;
    for (int i = int(threadIdx.x) % kWarpLanes; i < number; i += kWarpLanes) below += key(i) < trial;
#pragma unroll
    for (int step = kWarpLanes / 2; step; step /= 2) below += __shfl_xor_sync(kAllLanes, below, step);
    if (below < n) found = trial;
  }
  return found;
}

__global__ void __launch_bounds__(kThreads) masks_kernel(
    const int64_t* first, const int32_t* counts, bool* out, uint64_t purpose, int crops, int batch, MaskGrid grid, bool in_blocks) {
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared_memory());             // of the patches
  uint32_t* numbers = reinterpret_cast<uint32_t*>(keys + grid.patches());    // of the crops
  MaskBlock* blocks = reinterpret_cast<MaskBlock*>(numbers + crops);
  const int own = int(blockIdx.x), thread = int(threadIdx.x), patches = grid.patches();
  const int64_t image = *first;
  for (int i = thread; i < crops; i += kThreads) numbers[i] = upper_bits(next_bits(bits_of_crop(purpose, image, i, batch), kCountKey));
  __syncthreads();
  const uint64_t place = nth_smallest(own + 1, 24 + 32, crops, [&](int i) { return uint64_t(numbers[i]) << 32 | uint32_t(i); });
  const int count = counts[place & 0xffffffffu];

  const uint64_t crop = bits_of_crop(purpose, image, own, batch), bits = next_bits(crop, kPatchKey);
  if (in_blocks) {
    if (thread < kBlocks) blocks[thread] = draw_block(crop, thread, count, grid);
    __syncthreads();
  }
  for (int n = thread; n < patches; n += kThreads) keys[n] = in_blocks ? block_key(bits, n, blocks, grid) : random_key(bits, n);
  __syncthreads();
  const uint64_t last = nth_smallest(count, 63, patches, [&](int i) { return keys[i]; });
  for (int n = thread; n < patches; n += kThreads) out[int64_t(own) * patches + n] = count > 0 && keys[n] <= last;
}

Tensor block_masks_fwd(
    const Tensor& first, const Tensor& counts, int64_t seed, int64_t views, int64_t height, int64_t width, bool in_blocks) {
  const int64_t crops = counts.size(0), batch = crops / views;
  Tensor out = torch::stable::new_empty(counts, {views, batch, height * width}, ScalarType::Bool);
  const MaskGrid grid{int(height), int(width)};
  const uint64_t purpose = next_bits(next_bits(0, uint64_t(seed)), kPurpose);
  const size_t shared = grid.patches() * sizeof(uint64_t) + crops * sizeof(uint32_t) + kBlocks * sizeof(MaskBlock);
  const OnDevice device(counts);
  launch(device, masks_kernel, dim3{unsigned(crops), 1, 1}, kThreads, shared, static_cast<const int64_t*>(first.data_ptr()),
         static_cast<const int32_t*>(counts.data_ptr()), static_cast<bool*>(out.data_ptr()), purpose, int(crops), int(batch), grid,
         in_blocks);
  return out;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) { m.impl("block_masks_fwd", TORCH_BOX(&patchlight::block_masks_fwd)); }
