// What kernels and their launchers need: launch, streams, shared memory, asynchronous copies, once for the GPU and once for a CPU.
// Kernels use dynamic shared memory only, through `shared_memory()`.
#pragma once

#include "native.h"

#ifdef PATCHLIGHT_CPU_DEVICE
#include "cpu_device.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace patchlight {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

__device__ __forceinline__ int min_int(int a, int b) { return a < b ? a : b; }

// x, or 0 if it is above; NaN stays. A score minus its row's log-sum-exp is above 0 by rounding alone, which in large scores is large.
__device__ __forceinline__ float at_most_zero(float x) { return x > 0 ? 0.0f : x; }

struct EqualLanes {  // of the lanes of a warp that have this lane's value: how many come before it, and how many there are
  int before, total;
};

#ifdef PATCHLIGHT_CPU_DEVICE

constexpr int kMaxBlocksY = 3;  // so few that tests have more

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  size_t shared_memory_limit() const { return 99 * 1024; }
};

inline int multiprocessors(const Tensor&) { return 1; }

template <class... Params, class... Args>
void launch(const OnDevice&, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
  cpu_device::launch(kernel, grid, threads, shared_bytes, args...);
}

inline char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(cpu_device::block->shared.data()) + 127) & ~uintptr_t(127));
}

inline EqualLanes equal_lanes(int value) {
  return cpu_device::exchange(value, [&](auto lane) {
    EqualLanes equal{0, 0};
    for (int other = 0; other < kWarpLanes; ++other)
      if (lane(other) == value) ++equal.total, equal.before += other < cpu_device::lane();
    return equal;
  });
}

inline void copy16_async(void* shared, const void* global, int bytes) {
  std::memset(shared, 0, 16);
  std::memcpy(shared, global, bytes);
}
inline void commit_copies() {}
template <int PENDING>
inline void wait_copies() {}

#else

constexpr int kMaxBlocksY = 65535;

#define PATCHLIGHT_CUDA_CHECK(call)                                                                              \
  do {                                                                                                           \
    const cudaError_t status_ = (call);                                                                          \
    STD_TORCH_CHECK(status_ == cudaSuccess, "CUDA error: ", cudaGetErrorString(status_), " in " #call);          \
  } while (0)

// Makes the tensor's device current, and has its stream and its limit of shared memory.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    PATCHLIGHT_CUDA_CHECK(cudaDeviceGetAttribute(&limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, tensor.get_device_index()));
  }
  cudaStream_t stream() const { return stream_; }
  size_t shared_memory_limit() const { return size_t(limit_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int limit_ = 0;
};

inline int multiprocessors(const Tensor& tensor) {
  int count = 0;
  PATCHLIGHT_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

template <class... Params, class... Args>
void launch(const OnDevice& device, void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
  if (shared_bytes > 48 * 1024)
    PATCHLIGHT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream();
  PATCHLIGHT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char patchlight_shared[];
  return patchlight_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Every lane of the warp calls it.
__device__ __forceinline__ EqualLanes equal_lanes(int value) {
  const unsigned same = __match_any_sync(kAllLanes, value);
  return {__popc(same & ((1u << (threadIdx.x % kWarpLanes)) - 1)), __popc(same)};
}

// Copies 16 bytes to shared memory: the first `bytes` from global memory, then zeros. All of these statements name memory, so
// that the compiler moves no access of shared memory across them.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif

}  // namespace patchlight
