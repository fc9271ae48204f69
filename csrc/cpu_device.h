// Runs CUDA kernels on a CPU, for tests without a GPU: one block at a time, all its threads on one CPU thread, which changes
// between them where they wait for one another. Under a sanitizer each CUDA thread is a CPU thread: the thread sanitizer finds
// a missing __syncthreads, the address sanitizer an access out of bounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define PATCHLIGHT_CPU_THREADS
#include <barrier>
#include <thread>
#else
#include <sys/mman.h>
#include <ucontext.h>
#endif

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

#ifdef PATCHLIGHT_CPU_THREADS

using Barrier = std::barrier<>;
inline void wait(Barrier& barrier) { barrier.arrive_and_wait(); }

inline thread_local dim3 thread_index;

inline void run_block(int threads, const std::function<void()>& kernel) {
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t)
    workers.emplace_back([=] {
      thread_index = {unsigned(t), 0, 0};
      kernel();
    });
  for (auto& worker : workers) worker.join();
}

#else

inline dim3 thread_index;  // of the one that runs

// The threads of a block. Each has its own stack, which is used again for the next block.
struct Threads {
  static constexpr size_t kStack = 256 * 1024;
  ucontext_t scheduler;
  std::vector<ucontext_t> contexts;
  std::vector<char*> stacks;
  std::vector<bool> done;
  const std::function<void()>* kernel = nullptr;
  bool progress = false;  // has any thread advanced since all were resumed once?
};
inline Threads threads_of_block;

struct Barrier {
  explicit Barrier(int count) : count(count) {}
  int count, arrived = 0;
  unsigned turn = 0;
};

inline void wait(Barrier& barrier) {
  Threads& all = threads_of_block;
  const unsigned turn = barrier.turn;
  if (++barrier.arrived == barrier.count) {
    barrier.arrived = 0, ++barrier.turn;
    all.progress = true;
    return;
  }
  while (barrier.turn == turn) swapcontext(&all.contexts[thread_index.x], &all.scheduler);
}

inline void begin_thread() {
  Threads& all = threads_of_block;
  (*all.kernel)();
  all.done[thread_index.x] = all.progress = true;
}  // continues in the scheduler, its uc_link

inline void run_block(int threads, const std::function<void()>& kernel) {
  Threads& all = threads_of_block;
  all.kernel = &kernel;
  all.contexts.resize(threads);
  all.done.assign(threads, false);
  while (int(all.stacks.size()) < threads) {
    void* pages = mmap(nullptr, Threads::kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) std::fprintf(stderr, "cpu_device: no memory for a thread's stack\n"), std::abort();
    all.stacks.push_back(static_cast<char*>(pages));
  }
  for (int t = 0; t < threads; ++t) {
    ucontext_t& context = all.contexts[t];
    getcontext(&context);
    context.uc_stack.ss_sp = all.stacks[t];
    context.uc_stack.ss_size = Threads::kStack;
    context.uc_link = &all.scheduler;
    makecontext(&context, begin_thread, 0);
  }
  for (int left = threads; left;) {
    all.progress = false;
    left = 0;
    for (int t = 0; t < threads; ++t) {
      if (all.done[t]) continue;
      thread_index = {unsigned(t), 0, 0};
      swapcontext(&all.scheduler, &all.contexts[t]);
      left += !all.done[t];
    }
    if (!all.progress) std::fprintf(stderr, "cpu_device: %d threads wait at a barrier that the others never reach\n", left), std::abort();
  }
}

#endif

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  Barrier barrier;
  char slot[kWarp][64];  // the value of each lane, for the others to read
};

struct Block {
  Block(int threads, size_t shared_bytes) : barrier(threads), shared(shared_bytes + 128, char(0xff)) {  // 0xff..: NaN
    for (int first = 0; first < threads; first += kWarp) warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
  }
  Barrier barrier;
  std::vector<char> shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Block* block = nullptr;
inline dim3 block_dim, grid_dim, block_index;

inline int lane() { return int(thread_index.x) % kWarp; }
inline Warp& warp() { return *block->warps[thread_index.x / kWarp]; }

// Every lane publishes `value`; `read` gets a function from a lane's number to its value.
template <class T, class F>
auto exchange(const T& value, F read) {
  static_assert(sizeof(T) <= sizeof(Warp::slot[0]));
  Warp& w = warp();
  std::memcpy(w.slot[lane()], &value, sizeof value);
  wait(w.barrier);
  auto result = read([&](int from) {
    T other;
    std::memcpy(&other, w.slot[from], sizeof other);
    return other;
  });
  wait(w.barrier);
  return result;
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
  block_dim = {unsigned(threads), 1, 1};
  grid_dim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block current(threads, shared_bytes);
        block = &current;
        block_index = {x, y, z};
        run_block(threads, [=] { kernel(static_cast<Params>(args)...); });
        block = nullptr;
      }
}

}  // namespace cpu_device

#define threadIdx cpu_device::thread_index
#define blockIdx cpu_device::block_index
#define blockDim cpu_device::block_dim
#define gridDim cpu_device::grid_dim

inline void __syncthreads() { cpu_device::wait(cpu_device::block->barrier); }
inline void __syncwarp() { cpu_device::wait(cpu_device::warp().barrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cpu_device::exchange(value, [&](auto lane) { return lane(cpu_device::lane() ^ mask); });
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cpu_device::exchange(value, [&](auto lane) { return lane(from); });
}
