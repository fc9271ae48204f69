// square_sums on the GPU, two kernels without atomics: a block sums a chunk, then a block sums the chunks of a tensor.
#include "../addresses.h"
#include "../device.h"
#include "../four.h"

namespace patchlight {
namespace {

constexpr int kRows = 3;  // of the table: values, first block, address
constexpr int kThreads = 256;

// The sum over the block, in its first thread.
__device__ __forceinline__ float block_sum(float value) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int thread = int(threadIdx.x);
#pragma unroll
  for (int step = kWarpLanes / 2; step; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  if (thread % kWarpLanes == 0) sums[thread / kWarpLanes] = value;
  __syncthreads();
  float total = 0;
  if (thread == 0)
    for (int warp = 0; warp < kThreads / kWarpLanes; ++warp) total += sums[warp];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) chunk_kernel(Table table, Blocks blocks, float* sums) {
  const int block = int(blockIdx.x), tensor = blocks.tensor(block);
  const int64_t first = blocks.first(block);
  const int count = chunk_values(table.at(0, tensor) - first);
  const T* x = table.pointer<const T>(2, tensor, first);
  const bool aligned = is_aligned(x);
  float sum = 0;
#pragma unroll
  for (int start = 0; start < kChunkValues; start += kThreads * kFour) {
    const int at = start + int(threadIdx.x) * kFour;
    const Four<T> four = read_four(x, at, count, aligned);
#pragma unroll
    for (int i = 0; i < kFour; ++i) sum += float(four.value[i]) * float(four.value[i]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[block] = sum;
}

__global__ void __launch_bounds__(kThreads) tensor_kernel(Table table, const float* sums, float* out) {
  const int tensor = int(blockIdx.x);
  const int chunks = int((table.at(0, tensor) + kChunkValues - 1) / kChunkValues);
  const float* own = sums + table.at(1, tensor);
  float sum = 0;
  for (int i = int(threadIdx.x); i < chunks; i += kThreads) sum += own[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[tensor] = sum;
}

Tensor square_sums_fwd(const Tensor& table_tensor, const Tensor& blocks_tensor, ScalarType dtype) {
  check_tables(table_tensor, blocks_tensor, kRows, "square_sums");
  const Table table(table_tensor);
  const Blocks blocks(blocks_tensor);
  Tensor out = torch::stable::new_empty(table_tensor, {table.count}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(table_tensor, {blocks.count}, ScalarType::Float);
  float *to = static_cast<float*>(out.data_ptr()), *of_block = static_cast<float*>(sums.data_ptr());
  const OnDevice device(table_tensor);
  const size_t shared = sizeof(float) * kThreads / kWarpLanes;
  with_float_type(dtype, "square_sums", [&](auto type) {
    using T = typename decltype(type)::type;
    launch(device, chunk_kernel<T>, dim3{unsigned(blocks.count), 1, 1}, kThreads, shared, table, blocks, of_block);
  });
  launch(device, tensor_kernel, dim3{unsigned(table.count), 1, 1}, kThreads, shared, table, static_cast<const float*>(of_block), to);
  return out;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) { m.impl("square_sums_fwd", TORCH_BOX(&patchlight::square_sums_fwd)); }
