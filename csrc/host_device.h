// Functions for the CPU and the GPU.
#pragma once

#if defined(__CUDACC__)
#define PATCHLIGHT_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PATCHLIGHT_HOST_DEVICE inline __attribute__((always_inline))
#else
#define PATCHLIGHT_HOST_DEVICE inline
#endif
