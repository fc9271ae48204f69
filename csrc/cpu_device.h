// A CPU that CUDA kernels can run on: one block at a time, one thread per CUDA thread, barriers for barriers.
// For tests without a GPU: the thread sanitizer sees a missing __syncthreads, the address sanitizer a wild pointer.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace cpu_device {

constexpr int kWarp = 32;

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  char slot[kWarp][64];  // what a lane shows the others
};

struct Block {
  Block(int threads, size_t shared_bytes) : barrier(threads), shared(shared_bytes + 128, char(0xff)) {  // 0xff..: NaN
    for (int first = 0; first < threads; first += kWarp) warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
  }
  std::barrier<> barrier;
  std::vector<char> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Block* block = nullptr;
inline dim3 block_dim, grid_dim, block_index;
inline thread_local dim3 thread_index;

inline int lane() { return int(thread_index.x) % kWarp; }
inline Warp& warp() { return *block->warps[thread_index.x / kWarp]; }

// Every lane shows `mine`; `read(slots)` may look at all of them before they change again.
template <class T, class F>
auto exchange(const T& mine, F read) {
  static_assert(sizeof(T) <= sizeof(Warp::slot[0]));
  Warp& w = warp();
  std::memcpy(w.slot[lane()], &mine, sizeof mine);
  w.barrier.arrive_and_wait();
  auto result = read([&](int from) {
    T value;
    std::memcpy(&value, w.slot[from], sizeof value);
    return value;
  });
  w.barrier.arrive_and_wait();
  return result;
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
  block_dim = {unsigned(threads), 1, 1};
  grid_dim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block running(threads, shared_bytes);
        block = &running;
        block_index = {x, y, z};
        std::vector<std::thread> workers;
        for (int t = 0; t < threads; ++t)
          workers.emplace_back([=] {
            thread_index = {unsigned(t), 0, 0};
            kernel(static_cast<Params>(args)...);
          });
        for (auto& worker : workers) worker.join();
        block = nullptr;
      }
}

}  // namespace cpu_device

#define threadIdx cpu_device::thread_index
#define blockIdx cpu_device::block_index
#define blockDim cpu_device::block_dim
#define gridDim cpu_device::grid_dim

inline void __syncthreads() { cpu_device::block->barrier.arrive_and_wait(); }
inline void __syncwarp() { cpu_device::warp().barrier.arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cpu_device::exchange(value, [&](auto lane) { return lane(cpu_device::lane() ^ mask); });
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cpu_device::exchange(value, [&](auto lane) { return lane(from); });
}
