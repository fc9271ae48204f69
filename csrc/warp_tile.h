// A warp's product of 32 rows (16 times M) with 64 columns, both staged as chunks (chunk.h): sum[row, column] over the channels.
// A lane has kRows x kColumns of the sums; the kSharers lanes that differ in their low bits have the rest of its rows.
#pragma once

#include "chunk.h"
#include "mma.h"

namespace patchlight {

constexpr int kTileRows = 32;
constexpr int kTileColumns = 64;

template <class T, int M = 2>
struct WarpTile {  // 16-bit values: M x 8 tensor-core tiles
  static constexpr int kRows = 2 * M, kColumns = 16, kSharers = 4;
  float sum[M][8][4];

  __device__ __forceinline__ static int row(int i) { return i / 2 * 16 + i % 2 * 8 + int(threadIdx.x) % 32 / 4; }
  __device__ __forceinline__ static int column(int j) { return j / 2 * 8 + int(threadIdx.x) % 4 * 2 + j % 2; }
  __device__ __forceinline__ float& at(int i, int j) { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at(i, j) = 0;
  }

  // Adds one chunk: rows from row `first` of `rows` on, all of `columns`.
  __device__ __forceinline__ void multiply(const char* rows, int first, const char* columns) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int step = 0; step < kChunkChannels<T> / 16; ++step) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) load_matrices(a[m], rows + chunk_offset(first + m * 16 + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t b[4];
        load_matrices(b, columns + chunk_offset(pair * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          multiply_add<T>(sum[m][2 * pair], a[m], b[0], b[1]);
          multiply_add<T>(sum[m][2 * pair + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

template <int M>
struct WarpTile<float, M> {  // fp32 values: rows and columns interleaved over the lanes, so that no two read the same bank
  static constexpr int kRows = 4 * M, kColumns = 8, kSharers = 8;
  float sum[kRows][kColumns];

  __device__ __forceinline__ static int row(int i) { return int(threadIdx.x) % 32 / 8 + 4 * i; }
  __device__ __forceinline__ static int column(int j) { return int(threadIdx.x) % 8 + 8 * j; }
  __device__ __forceinline__ float& at(int i, int j) { return sum[i][j]; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = 0;
  }

  __device__ __forceinline__ void multiply(const char* rows, int first, const char* columns) {
    for (int unit = 0; unit < kUnits; ++unit) {
      float4 b[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) b[j] = *reinterpret_cast<const float4*>(columns + chunk_offset(column(j), unit));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(rows + chunk_offset(first + row(i), unit));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] += a.x * b[j].x + a.y * b[j].y + a.z * b[j].z + a.w * b[j].w;
      }
    }
  }
};

// Over the lanes that share a row.
template <class Tile>
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int step = 1; step < Tile::kSharers; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <class Tile>
__device__ __forceinline__ float row_max(float value) {
#pragma unroll
  for (int step = 1; step < Tile::kSharers; step *= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

}  // namespace patchlight
