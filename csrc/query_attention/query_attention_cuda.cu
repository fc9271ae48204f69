// query_attention on the GPU.
// Tokens are in tiles of 16: first the raw tokens, then each crop of queries, each filled up to whole tiles. So a tile of rows
// reads whole tiles of keys and no others. Missing tokens are rows of zeros.
//   attend       one block per head and image while all keys and values fit in shared memory: a warp takes 16 rows at a time,
//                all scores of which stay in its registers, so that the softmax needs one pass
//   attend_long  more keys: a block per 64 rows, keys are loaded in chunks, with a running maximum
//   backward     a block owns up to 256 keys of a head and a warp 32 of them, with dK and dV in registers while chunks of rows
//                are loaded; dS goes through shared memory to the warps that make dQ. Nothing is atomic: with more keys, each
//                block writes its part of dQ to memory
//   total        sums those parts
// Scores are in units of log2. 32-bit values are multiplied as sums of three bfloat16, which keeps 24 bits of them.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../chunk.h"
#include "../mma.h"

namespace patchlight {
namespace {

constexpr int kTile = 16;
constexpr int kWidth = 64;            // channels of a row in shared memory
constexpr int kSteps = kWidth / kTile;
constexpr int kAttendWarps = 4;
template <class T>
constexpr int kAttendBlocks = sizeof(T) == 2 ? 2 : 1;  // per multiprocessor, as registers allow
constexpr int kFewTiles = 4, kManyTiles = 16;  // of keys whose scores fit the registers
template <class T>
constexpr int kLongTiles = sizeof(T) == 2 ? 8 : 2;  // of keys in a chunk
constexpr int kBackwardWarps = 8;
template <class T>
constexpr int kWarpTiles = sizeof(T) == 2 ? 2 : 1;  // of keys that a warp owns

__device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarpLanes; }
__device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarpLanes; }

// ------------------------------------------------------------------------------------------------ which rows read which keys

// Which of the tiles in shared memory a tile of rows reads, in few registers.
struct ReadTiles {
  unsigned mask;  // a bit for each tile that is read
  int staged;     // all tiles in shared memory
  int raw_last, raw_rest, own_last, own_rest;  // the tiles that may not be full, and how many tokens they have
  __device__ __forceinline__ bool is_read(int t) const { return mask >> t & 1; }
  __device__ __forceinline__ int tokens(int t) const { return t == raw_last ? raw_rest : t == own_last ? own_rest : kTile; }
};

// The tiles that a tile of rows reads: the raw ones, and those of its own crop.
struct Reads {
  int raw, raw_tiles, crop_tokens, own_first, own_tiles;
  __device__ __forceinline__ int count() const { return raw_tiles + own_tiles; }
  __device__ __forceinline__ int tile(int i) const { return i < raw_tiles ? i : own_first + i - raw_tiles; }
  __device__ __forceinline__ ReadTiles read_tiles(int first, int own_first, int staged, unsigned mask) const {
    const int own_last = own_first + own_tiles - 1 - first;
    return {mask, staged, raw_tiles - 1 - first, raw - (raw_tiles - 1) * kTile, own_last, own_tiles ? crop_tokens - (own_tiles - 1) * kTile : kTile};
  }
  // If all tiles are in shared memory.
  __device__ __forceinline__ ReadTiles in_place(int tiles) const {
    return read_tiles(0, own_first, tiles, ((1u << raw_tiles) - 1) | ((1u << own_tiles) - 1) << own_first);
  }
  // If shared memory has only the tiles that are read, from the `first`-th on.
  __device__ __forceinline__ ReadTiles adjacent(int first) const {
    const int left = count() - first;
    return read_tiles(first, raw_tiles, left, left < 32 ? (1u << left) - 1 : ~0u);
  }
  // How many tokens of a segment that is read are in a tile and behind it; 0 or less: none.
  __device__ __forceinline__ int tokens(int tile) const {
    if (tile < raw_tiles) return raw - tile * kTile;
    const int in_crop = tile - own_first;
    return in_crop >= 0 && in_crop < own_tiles ? crop_tokens - in_crop * kTile : 0;
  }
};

struct Layout {
  int raw, crop_tokens, crops;
  bool own;  // whether queries read their crop
  __host__ __device__ __forceinline__ int raw_tiles() const { return (raw + kTile - 1) / kTile; }
  __host__ __device__ __forceinline__ int crop_tiles() const { return (crop_tokens + kTile - 1) / kTile; }
  __host__ __device__ __forceinline__ int tiles() const { return raw_tiles() + crops * crop_tiles(); }
  __host__ __device__ __forceinline__ int tokens() const { return raw + crops * crop_tokens; }
  // The crop of a tile of queries, -1 for raw tokens.
  __device__ __forceinline__ int crop(int tile) const { return tile < raw_tiles() ? -1 : (tile - raw_tiles()) / crop_tiles(); }
  // The token in a row of a tile, or -1.
  __device__ __forceinline__ int token(int tile, int row) const {
    const int crop = this->crop(tile);
    if (crop < 0) return tile * kTile + row < raw ? tile * kTile + row : -1;
    const int in_crop = (tile - raw_tiles() - crop * crop_tiles()) * kTile + row;
    return in_crop < crop_tokens ? raw + crop * crop_tokens + in_crop : -1;
  }
  __device__ __forceinline__ Reads reads(int crop) const {
    const bool more = own && crop >= 0;
    return {raw, raw_tiles(), crop_tokens, more ? raw_tiles() + crop * crop_tiles() : 0, more ? crop_tiles() : 0};
  }
};

template <class T>
struct Heads {  // rows of one head: [images, tokens, heads, width] with dense width
  const T* data;
  int64_t image, token, head;
  bool aligned;
  __device__ __forceinline__ const T* of(int image_index, int head_index) const {
    return data + image_index * image + head_index * head;
  }
};

template <class T>
struct Problem {
  Layout layout;
  int heads, width;
  float scale;
  Heads<T> q, k, v;
  __host__ __device__ __forceinline__ int steps() const { return (width + kTile - 1) / kTile; }
};

// -------------------------------------------------------------------------------------------------- fragments

// Rows of 64 values in shared memory.
template <class T>
struct Staged {
  static constexpr int kBytes = kWidth * int(sizeof(T));  // of a row
  char* data;
  int rows;
  __device__ __forceinline__ char* at(int row, int channel) const {
    constexpr int kUnit = kUnitBytes / int(sizeof(T));
    return data + channel / kChunkChannels<T> * rows * kChunkBytes +
           chunk_offset(row, channel % kChunkChannels<T> / kUnit) + channel % kUnit * int(sizeof(T));
  }
};

// A lane's part of 16 x 16 values, of either operand.
template <class T>
struct Fragment {
  static constexpr int kParts = sizeof(T) == 4 ? 3 : 1;
  using Part = std::conditional_t<sizeof(T) == 4, BFloat16, T>;
  uint32_t part[kParts][4];

  __device__ __forceinline__ void set(int i, float x, float y) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const Part pair[2] = {Part(x), Part(y)};
      memcpy(&part[p][i], pair, sizeof pair);
      if (p + 1 < kParts) x = rest(x, float(pair[0])), y = rest(y, float(pair[1]));
    }
  }
  // From 16 rows and 16 channels on. Of the four 8 x 8 matrices the second is the next in rows if ROWS_FIRST, else in channels.
  // A left operand has ROWS_FIRST; a right one, whose rows are the product's columns, has not. TRANSPOSED if the product sums
  // over the rows in shared memory; then it is the other way round.
  template <bool ROWS_FIRST, bool TRANSPOSED>
  __device__ __forceinline__ void load(const Staged<T>& from, int row, int channel) {
    if constexpr (sizeof(T) == 2) {
      const int second = lane() / 8 % 2 * 8, third = lane() / 16 * 8;
      const char* address = from.at(row + lane() % 8 + (ROWS_FIRST ? second : third), channel + (ROWS_FIRST ? third : second));
      if constexpr (TRANSPOSED) load_transposed(part[0], address);
      else load_matrices(part[0], address);
    } else {
      const int g = lane() / 4, t = lane() % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + 8 * (ROWS_FIRST ? i % 2 : i / 2), c = channel + 8 * (ROWS_FIRST ? i / 2 : i % 2);
        if constexpr (TRANSPOSED) set(i, value(from, r + t, c + g), value(from, r + t + 1, c + g));
        else set(i, value(from, r + g, c + t), value(from, r + g, c + t + 1));
      }
    }
  }

 private:
  __device__ __forceinline__ static float rest(float x, float taken) { return fabsf(taken) < INFINITY ? x - taken : 0.0f; }
  __device__ __forceinline__ static float value(const Staged<T>& from, int row, int channel) {
    return *reinterpret_cast<const float*>(from.at(row, channel));
  }
};

// d[16, 8] += a times column block `n` (0 or 1) of b.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Fragment<T>& a, const Fragment<T>& b, int n) {
#pragma unroll
  for (int i = Fragment<T>::kParts - 1; i >= 0; --i)
#pragma unroll
    for (int j = Fragment<T>::kParts - 1 - i; j >= 0; --j)
      multiply_add<typename Fragment<T>::Part>(d, a.part[i], b.part[j][2 * n], b.part[j][2 * n + 1]);
}

// 16 x 16 sums as the left operand of another product.
template <class T>
__device__ __forceinline__ Fragment<T> as_left(const float (&left)[4], const float (&right)[4]) {
  Fragment<T> fragment;
  fragment.set(0, left[0], left[1]);
  fragment.set(1, left[2], left[3]);
  fragment.set(2, right[0], right[1]);
  fragment.set(3, right[2], right[3]);
  return fragment;
}

// Writes two adjacent values of a row of `width` values.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int channel, int width, float x, float y) {
  struct alignas(2 * sizeof(T)) Pair {
    T x, y;
  };
  if (width % 2 == 0) {
    if (channel < width) *reinterpret_cast<Pair*>(row + channel) = {T(x), T(y)};
  } else {
    if (channel < width) row[channel] = T(x);
    if (channel + 1 < width) row[channel + 1] = T(y);
  }
}

// Copies one 16-byte unit of a token's row of one head to row `to` in shared memory; zeros if the token is missing.
template <class T>
__device__ __forceinline__ void stage_row(const Staged<T>& out, int to, const T* head, int64_t stride, int token, int width,
                                          int steps, bool aligned, int unit) {
  constexpr int kUnit = kUnitBytes / int(sizeof(T));
  if (unit < steps * kTile / kUnit)
    stage_unit(out.at(to, unit * kUnit), token < 0 ? head : head + token * stride, unit * kUnit, token < 0 ? 0 : width, aligned);
}

// Calls f(row, unit) for all 16-byte units of some rows, divided over the block.
template <class T, class F>
__device__ __forceinline__ void for_units(int rows, F f) {
  constexpr int kRowUnits = kWidth * int(sizeof(T)) / kUnitBytes;
  for (int i = threadIdx.x; i < rows * kRowUnits; i += blockDim.x) f(i / kRowUnits, i % kRowUnits);
}

// ---------------------------------------------------------------------------------------------------- forward

// The 16 rows of a warp.
template <class T>
struct Rows {
  const T* row[2];  // of the lane: g and g + 8, or null
  float out[kWidth / 8][4];
  float top[2], total[2];

  __device__ __forceinline__ void begin(const Problem<T>& p, const T* q, int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = p.layout.token(tile, lane() / 4 + half * 8);
      row[half] = token < 0 ? nullptr : q + token * p.q.token;
      top[half] = -3.0e38f;  // finite, as all scores may be -inf
      total[half] = 0;
    }
    clear();
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
  }
  __device__ __forceinline__ Fragment<T> query(const Problem<T>& p, int step) const {
    Fragment<T> fragment;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* from = row[i % 2];
      const int channel = step * kTile + i / 2 * 8 + lane() % 4 * 2;
      fragment.set(i, from && channel < p.width ? float(from[channel]) : 0.0f,
                   from && channel + 1 < p.width ? float(from[channel + 1]) : 0.0f);
    }
    return fragment;
  }

  // Adds the keys that are read of TILES tiles in shared memory. ONLY: these are all, none before or after.
  template <int TILES, bool ONLY>
  __device__ __forceinline__ void attend(const Problem<T>& p, const Staged<T>& keys, const Staged<T>& values,
                                         const ReadTiles& read_tiles) {
    float score[2 * TILES][4];
#pragma unroll
    for (int n = 0; n < 2 * TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n][i] = 0;
#pragma unroll 1
    for (int step = 0; step < p.steps(); ++step) {
      const Fragment<T> queries = query(p, step);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        if (t >= read_tiles.staged) continue;
        Fragment<T> key;
        key.template load<false, false>(keys, t * kTile, step * kTile);
        multiply(score[2 * t], queries, key, 0);
        multiply(score[2 * t + 1], queries, key, 1);
      }
    }
    const float scale = p.scale * kLog2e;
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float& value = score[2 * t + j / 4][j % 4];
        value = read_tiles.is_read(t) && j / 4 * 8 + lane() % 4 * 2 + j % 2 < read_tiles.tokens(t) ? value * scale : -INFINITY;
        highest[j % 4 / 2] = fmaxf(highest[j % 4 / 2], value);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(kAllLanes, highest[half], 1));
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(kAllLanes, highest[half], 2));
      const float rescale = ONLY ? 0.0f : exp2f(top[half] - highest[half]);
      total[half] *= rescale;
      top[half] = highest[half];
      if constexpr (!ONLY) {
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) out[n][2 * half] *= rescale, out[n][2 * half + 1] *= rescale;
      }
    }
    Fragment<T> weights[TILES];  // all at once, as they need half the registers of scores
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float& value = score[2 * t + j / 4][j % 4];
        value = exp2f(value - top[j % 4 / 2]);
        total[j % 4 / 2] += value;
      }
      weights[t] = as_left<T>(score[2 * t], score[2 * t + 1]);
    }
    if constexpr (ONLY) clear();
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      if (!read_tiles.is_read(t)) continue;
#pragma unroll
      for (int pair = 0; pair < kSteps; ++pair) {
        if (pair >= p.steps()) continue;
        Fragment<T> value;
        value.template load<true, true>(values, t * kTile, pair * kTile);
        multiply(out[2 * pair], weights[t], value, 0);
        multiply(out[2 * pair + 1], weights[t], value, 1);
      }
    }
  }

  __device__ __forceinline__ void end(const Problem<T>& p, int tile, int64_t image, int head, T* target, float* lse) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(kAllLanes, total[half], 1);
      total[half] += __shfl_xor_sync(kAllLanes, total[half], 2);
      const int token = p.layout.token(tile, lane() / 4 + half * 8);
      if (token < 0) continue;
      T* to = target + ((image * p.layout.tokens() + token) * p.heads + head) * p.width;
      const float inverse = 1 / total[half];
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
        store_pair(to, n * 8 + lane() % 4 * 2, p.width, out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
      if (lane() % 4 == 0)
        lse[(image * p.heads + head) * p.layout.tokens() + token] = (top[half] + log2f(total[half])) * kLn2;
    }
  }
};

template <class T, int TILES>
__global__ void __launch_bounds__(kAttendWarps* kWarpLanes, kAttendBlocks<T>)
    attend_kernel(Problem<T> p, T* out, float* lse) {
  const int image = int(blockIdx.x) / p.heads, head = int(blockIdx.x) % p.heads, tiles = p.layout.tiles(), rows = tiles * kTile;
  const Staged<T> keys{shared_memory(), rows}, values{shared_memory() + rows * Staged<T>::kBytes, rows};
  const T *k = p.k.of(image, head), *v = p.v.of(image, head);
  for_units<T>(rows, [&](int row, int unit) {
    const int token = p.layout.token(row / kTile, row % kTile);
    stage_row(keys, row, k, p.k.token, token, p.width, p.steps(), p.k.aligned, unit);
    stage_row(values, row, v, p.v.token, token, p.width, p.steps(), p.v.aligned, unit);
  });
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  for (int tile = warp(); tile < tiles; tile += kAttendWarps) {
    const Reads reads = p.layout.reads(p.layout.crop(tile));
    // A 0 that the compiler does not know: else it would keep 80 addresses from one tile to the next, and registers would spill.
    const int opaque_zero = __shfl_sync(kAllLanes, 0, 0);
    Rows<T> own_rows;
    own_rows.begin(p, p.q.of(image, head), tile);
    own_rows.template attend<TILES, true>(p, {keys.data + opaque_zero, rows}, {values.data + opaque_zero, rows}, reads.in_place(tiles));
    own_rows.end(p, tile, image, head, out, lse);
  }
}

// A block has four tiles of rows that read the same keys.
template <class T>
__global__ void __launch_bounds__(kAttendWarps* kWarpLanes, kAttendBlocks<T>)
    attend_long_kernel(Problem<T> p, T* out, float* lse) {
  constexpr int kRows = kLongTiles<T> * kTile;
  const int image = int(blockIdx.x) / p.heads, head = int(blockIdx.x) % p.heads;
  const int raw_groups = (p.layout.raw_tiles() + kAttendWarps - 1) / kAttendWarps;
  const int crop_groups = (p.layout.crop_tiles() + kAttendWarps - 1) / kAttendWarps;
  const bool raw = int(blockIdx.y) < raw_groups;
  const int crop = raw ? -1 : (int(blockIdx.y) - raw_groups) / crop_groups;
  const int group = raw ? int(blockIdx.y) : (int(blockIdx.y) - raw_groups) % crop_groups;
  const int in_segment = group * kAttendWarps + warp();
  const bool exists = in_segment < (raw ? p.layout.raw_tiles() : p.layout.crop_tiles());
  const int tile = raw ? in_segment : p.layout.raw_tiles() + crop * p.layout.crop_tiles() + in_segment;
  const Reads reads = p.layout.reads(crop);
  const Staged<T> keys{shared_memory(), kRows}, values{shared_memory() + kRows * Staged<T>::kBytes, kRows};
  const T *k = p.k.of(image, head), *v = p.v.of(image, head);
  Rows<T> own_rows;
  own_rows.begin(p, p.q.of(image, head), exists ? tile : 0);
  for (int first = 0; first < reads.count(); first += kLongTiles<T>) {
    __syncthreads();
    for_units<T>(min_int(kLongTiles<T>, reads.count() - first) * kTile, [&](int row, int unit) {
      const int token = p.layout.token(reads.tile(first + row / kTile), row % kTile);
      stage_row(keys, row, k, p.k.token, token, p.width, p.steps(), p.k.aligned, unit);
      stage_row(values, row, v, p.v.token, token, p.width, p.steps(), p.v.aligned, unit);
    });
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    if (exists) own_rows.template attend<kLongTiles<T>, false>(p, keys, values, reads.adjacent(first));
  }
  if (exists) own_rows.end(p, tile, image, head, out, lse);
}

// --------------------------------------------------------------------------------------------------- backward

template <class T>
struct Backward {
  Problem<T> p;
  Heads<T> grad, out;
  const float* lse;  // [images, heads, tokens]
  T* dqkv;           // [images, tokens, 3, heads, width]
  float* dq_parts;     // [groups, images, tokens, heads, width], or null if one block owns all keys
  int group_tiles;   // of keys that a block owns
};

// Rows of a chunk: as many as values fit 128 bytes, so that a row of dS^T is one unit of chunk.h.
template <class T>
constexpr int kChunkRows = kChunkChannels<T>;
template <class T>
constexpr int kStageBytes = 2 * kChunkRows<T> * Staged<T>::kBytes + 2 * kChunkRows<T> * int(sizeof(float));
constexpr int kStages = 2;

// Adjacent rows of one segment, loaded together.
struct RowChunk {
  int crop, first_tile, tiles;
};

template <class T>
__device__ __forceinline__ RowChunk row_chunk(const Layout& layout, int index) {
  constexpr int kTiles = kChunkRows<T> / kTile;
  const int raw_chunks = (layout.raw_tiles() + kTiles - 1) / kTiles, crop_chunks = (layout.crop_tiles() + kTiles - 1) / kTiles;
  const bool raw = index < raw_chunks;
  const int crop = raw ? -1 : (index - raw_chunks) / crop_chunks;
  const int first = (raw ? index : (index - raw_chunks) % crop_chunks) * kTiles;
  const int all = raw ? layout.raw_tiles() : layout.crop_tiles();
  return {crop, (raw ? 0 : layout.raw_tiles() + crop * layout.crop_tiles()) + first, min_int(kTiles, all - first)};
}

template <class T>
__host__ __device__ int row_chunk_count(const Layout& layout) {
  constexpr int kTiles = kChunkRows<T> / kTile;
  return (layout.raw_tiles() + kTiles - 1) / kTiles + layout.crops * ((layout.crop_tiles() + kTiles - 1) / kTiles);
}

template <class T>
struct Stage {  // a chunk of rows in shared memory
  Staged<T> queries, upstream;
  float *log2_sum, *delta;  // delta: sum(g out) = sum(P dP)
  __device__ __forceinline__ explicit Stage(char* memory)
      : queries{memory, kChunkRows<T>}, upstream{memory + kChunkRows<T> * Staged<T>::kBytes, kChunkRows<T>},
        log2_sum(reinterpret_cast<float*>(memory + 2 * kChunkRows<T> * Staged<T>::kBytes)), delta(log2_sum + kChunkRows<T>) {}

  __device__ void fill(const Backward<T>& b, const RowChunk& rows, int image, int head) const {
    const Problem<T>& p = b.p;
    const T *q = p.q.of(image, head), *g = b.grad.of(image, head), *out = b.out.of(image, head);
    for_units<T>(kChunkRows<T>, [&](int row, int unit) {
      const int token = row < rows.tiles * kTile ? p.layout.token(rows.first_tile + row / kTile, row % kTile) : -1;
      stage_row(queries, row, q, p.q.token, token, p.width, p.steps(), p.q.aligned, unit);
      stage_row(upstream, row, g, b.grad.token, token, p.width, p.steps(), b.grad.aligned, unit);
    });
    for (int row = warp(); row < kChunkRows<T>; row += kBackwardWarps) {
      const int token = row < rows.tiles * kTile ? p.layout.token(rows.first_tile + row / kTile, row % kTile) : -1;
      float sum = 0;
      for (int channel = lane(); token >= 0 && channel < p.width; channel += kWarpLanes)
        sum += float(g[token * b.grad.token + channel]) * float(out[token * b.out.token + channel]);
#pragma unroll
      for (int distance = 1; distance < kWarpLanes; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (lane() == 0) {
        delta[row] = sum;
        log2_sum[row] = token < 0 ? INFINITY : b.lse[(int64_t(image) * p.heads + head) * p.layout.tokens() + token] * kLog2e;
      }
    }
    commit_copies();
  }
};

// 16 keys of a warp.
template <class T>
struct Keys {
  float dk[kWidth / 8][4], dv[kWidth / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0;
  }

  // Adds 16 rows of a stage, and writes their dS^T to shared memory. The keys are there from row `first` on; `present` exist.
  __device__ __forceinline__ void add_rows(const Problem<T>& p, const Stage<T>& stage, int row, const Staged<T>& keys,
                                          const Staged<T>& values, const Staged<T>& d_scores, int first, int present) {
    float weight[2][4] = {}, change[2][4] = {};
#pragma unroll 1
    for (int step = 0; step < p.steps(); ++step) {
      Fragment<T> left, right;
      left.template load<true, false>(keys, first, step * kTile);
      right.template load<false, false>(stage.queries, row, step * kTile);
      multiply(weight[0], left, right, 0);
      multiply(weight[1], left, right, 1);
      left.template load<true, false>(values, first, step * kTile);
      right.template load<false, false>(stage.upstream, row, step * kTile);
      multiply(change[0], left, right, 0);
      multiply(change[1], left, right, 1);
    }
    const float scale = p.scale * kLog2e;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = row + n * 8 + lane() % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool exists = lane() / 4 + i / 2 * 8 < present;
        const float value = exists ? exp2f(at_most_zero(weight[n][i] * scale - stage.log2_sum[column + i % 2])) : 0.0f;
        weight[n][i] = value;
        change[n][i] = exists ? value * (change[n][i] - stage.delta[column + i % 2]) : 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(reinterpret_cast<T*>(d_scores.at(first + lane() / 4 + half * 8, column)), 0, 2, change[n][2 * half],
                   change[n][2 * half + 1]);
    }
    const Fragment<T> weights = as_left<T>(weight[0], weight[1]), changes = as_left<T>(change[0], change[1]);
#pragma unroll
    for (int pair = 0; pair < kSteps; ++pair) {
      if (pair >= p.steps()) continue;
      Fragment<T> right;
      right.template load<true, true>(stage.upstream, row, pair * kTile);
      multiply(dv[2 * pair], weights, right, 0);
      multiply(dv[2 * pair + 1], weights, right, 1);
      right.template load<true, true>(stage.queries, row, pair * kTile);
      multiply(dk[2 * pair], changes, right, 0);
      multiply(dk[2 * pair + 1], changes, right, 1);
    }
  }
};

// A warp's part of dQ of a chunk: 16 rows, some channels, summed over the keys of the block that they read.
template <class T>
__device__ __forceinline__ void query_gradients(const Backward<T>& b, const RowChunk& rows, const Reads& reads, int image, int head, int first_tile, int tiles,
                                     const Staged<T>& keys, const Staged<T>& d_scores) {
  constexpr int kRowTiles = kChunkRows<T> / kTile, kShare = kWidth * kRowTiles / kBackwardWarps;  // channels
  const Problem<T>& p = b.p;
  const int row = warp() % kRowTiles, first_channel = warp() / kRowTiles * kShare;
  float sum[kShare / 8][4] = {};
  if (row < rows.tiles) {
    for (int t = 0; t < tiles; ++t) {
      if (reads.tokens(first_tile + t) <= 0) continue;
      Fragment<T> left;
      left.template load<false, true>(d_scores, t * kTile, row * kTile);
#pragma unroll
      for (int pair = 0; pair < kShare / kTile; ++pair) {
        if (first_channel + pair * kTile >= p.steps() * kTile) continue;
        Fragment<T> right;
        right.template load<true, true>(keys, t * kTile, first_channel + pair * kTile);
        multiply(sum[2 * pair], left, right, 0);
        multiply(sum[2 * pair + 1], left, right, 1);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = p.layout.token(rows.first_tile + row, lane() / 4 + half * 8);
      if (token < 0) continue;
      const int64_t at = int64_t(image) * p.layout.tokens() + token;
#pragma unroll
      for (int n = 0; n < kShare / 8; ++n) {
        const int channel = first_channel + n * 8 + lane() % 4 * 2;
        if (b.dq_parts) {
          const int64_t first_of_group = int64_t(blockIdx.y) * (gridDim.x / p.heads) * p.layout.tokens();
          store_pair(b.dq_parts + ((first_of_group + at) * p.heads + head) * p.width, channel, p.width, sum[n][2 * half], sum[n][2 * half + 1]);
        } else {
          store_pair(b.dqkv + (at * 3 * p.heads + head) * p.width, channel, p.width, sum[n][2 * half] * p.scale,
                     sum[n][2 * half + 1] * p.scale);
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBackwardWarps* kWarpLanes, 1) backward_kernel(Backward<T> b) {
  const Problem<T>& p = b.p;
  const int image = int(blockIdx.x) / p.heads, head = int(blockIdx.x) % p.heads;
  const int first_tile = int(blockIdx.y) * b.group_tiles, tiles = min_int(b.group_tiles, p.layout.tiles() - first_tile);
  const int slots = b.group_tiles * kTile;
  char* memory = shared_memory();
  const Staged<T> keys{memory, slots}, values{memory + slots * Staged<T>::kBytes, slots};
  const Staged<T> d_scores{memory + 2 * slots * Staged<T>::kBytes, slots};  // [keys][rows of a chunk]
  char* stages = memory + 2 * slots * Staged<T>::kBytes + slots * kChunkBytes;

  const T *k = p.k.of(image, head), *v = p.v.of(image, head);
  for_units<T>(tiles * kTile, [&](int row, int unit) {
    const int token = p.layout.token(first_tile + row / kTile, row % kTile);
    stage_row(keys, row, k, p.k.token, token, p.width, p.steps(), p.k.aligned, unit);
    stage_row(values, row, v, p.v.token, token, p.width, p.steps(), p.v.aligned, unit);
  });
  const int count = row_chunk_count<T>(p.layout);
  Stage<T>(stages).fill(b, row_chunk<T>(p.layout, 0), image, head);
  Keys<T> own_keys[kWarpTiles<T>];
#pragma unroll
  for (int j = 0; j < kWarpTiles<T>; ++j) own_keys[j].clear();

  for (int index = 0; index < count; ++index) {
    wait_copies<0>();
    __syncthreads();  // the rows are complete, and all warps are done with the other stage and with dS
    if (index + 1 < count)
      Stage<T>(stages + (index + 1) % kStages * kStageBytes<T>).fill(b, row_chunk<T>(p.layout, index + 1), image, head);
    const RowChunk rows = row_chunk<T>(p.layout, index);
    const Reads reads = p.layout.reads(rows.crop);
    const Stage<T> stage(stages + index % kStages * kStageBytes<T>);
#pragma unroll
    for (int j = 0; j < kWarpTiles<T>; ++j) {
      const int t = j * kBackwardWarps + warp();
      const int present = t < tiles ? reads.tokens(first_tile + t) : 0;
      if (present <= 0) continue;
      for (int row = 0; row < rows.tiles; ++row)
        own_keys[j].add_rows(p, stage, row * kTile, keys, values, d_scores, t * kTile, present);
    }
    __syncthreads();
    query_gradients(b, rows, reads, image, head, first_tile, tiles, keys, d_scores);
  }

#pragma unroll
  for (int j = 0; j < kWarpTiles<T>; ++j) {
    const int t = j * kBackwardWarps + warp();
    if (t >= tiles) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = p.layout.token(first_tile + t, lane() / 4 + half * 8);
      if (token < 0) continue;
      T* to = b.dqkv + ((int64_t(image) * p.layout.tokens() + token) * 3 * p.heads + head) * p.width;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        const int channel = n * 8 + lane() % 4 * 2;
        store_pair(to + p.heads * p.width, channel, p.width, own_keys[j].dk[n][2 * half] * p.scale, own_keys[j].dk[n][2 * half + 1] * p.scale);
        store_pair(to + 2 * p.heads * p.width, channel, p.width, own_keys[j].dv[n][2 * half], own_keys[j].dv[n][2 * half + 1]);
      }
    }
  }
}

// dQ of one token and all its heads: the sum of the parts of all blocks.
template <class T>
__global__ void total_kernel(const float* dq_parts, int groups, int64_t tokens, int values, float scale, T* dqkv) {
  for (int i = threadIdx.x; i < values; i += blockDim.x) {
    float sum = 0;
    for (int group = 0; group < groups; ++group) sum += dq_parts[(group * tokens + blockIdx.x) * values + i];
    dqkv[int64_t(blockIdx.x) * 3 * values + i] = T(sum * scale);
  }
}

// ----------------------------------------------------------------------------------------------------- launch

template <class T>
Heads<T> heads_of(const Tensor& x, int head_dim, int64_t offset = 0) {
  const T* data = static_cast<const T*>(x.data_ptr()) + offset;
  const int64_t image = x.stride(0), token = x.stride(1), head = x.stride(head_dim);
  return {data, image, token, head, rows_aligned(data, {image, token, head})};
}

template <class T>
Problem<T> problem_of(const Tensor& qkv, int64_t raw, int64_t crop) {
  const int64_t width = qkv.size(4), queries = qkv.size(1) - raw, crop_tokens = crop ? crop : queries, part = qkv.stride(2);
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && width <= kWidth && (width == 1 || qkv.stride(4) == 1),
                  "query_attention: qkv must be [images, tokens, 3, heads, width <= 64] with dense rows, got another layout; call the Python function.");
  return {{int(raw), int(crop_tokens), int(crop_tokens ? queries / crop_tokens : 0), crop > 0}, int(qkv.size(3)), int(width),
          1.0f / std::sqrt(float(width)), heads_of<T>(qkv, 3), heads_of<T>(qkv, 3, part), heads_of<T>(qkv, 3, 2 * part)};
}

unsigned blocks_of(int64_t count) {
  STD_TORCH_CHECK(count < (int64_t(1) << 31), "query_attention: one launch must have less than 2^31 blocks, got ", count, "; split the batch.");
  return unsigned(count);
}

std::tuple<Tensor, Tensor> query_attention_fwd(const Tensor& qkv, int64_t raw, int64_t crop) {
  const int64_t images = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3);
  Tensor out = torch::stable::new_empty(qkv, {images, tokens, heads, qkv.size(4)});
  Tensor lse = torch::stable::new_empty(qkv, {images, heads, tokens}, ScalarType::Float);
  const OnDevice device(qkv);
  with_float_type(qkv, "query_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    const Problem<T> p = problem_of<T>(qkv, raw, crop);
    const unsigned blocks = blocks_of(images * heads);
    auto* out_ptr = static_cast<T*>(out.data_ptr());
    auto* lse_ptr = static_cast<float*>(lse.data_ptr());
    const int threads = kAttendWarps * kWarpLanes, tiles = p.layout.tiles();
    const size_t all = size_t(2) * tiles * kTile * Staged<T>::kBytes;
    if constexpr (sizeof(T) == 2) {  // fp32 needs the registers for the three parts of its values
      const auto kernel = tiles <= kFewTiles ? attend_kernel<T, kFewTiles> : attend_kernel<T, kManyTiles>;
      if (tiles <= kManyTiles) return launch(device, kernel, dim3{blocks, 1, 1}, threads, all, p, out_ptr, lse_ptr);
    }
    const auto groups = [](int count) { return (count + kAttendWarps - 1) / kAttendWarps; };
    const int rows = groups(p.layout.raw_tiles()) + p.layout.crops * groups(p.layout.crop_tiles());
    launch(device, attend_long_kernel<T>, dim3{blocks, unsigned(rows), 1}, threads, size_t(2) * kLongTiles<T> * kTile * Staged<T>::kBytes,
           p, out_ptr, lse_ptr);
  });
  return {out, lse};
}

Tensor query_attention_bwd(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t raw, int64_t crop) {
  const int64_t images = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), width = qkv.size(4);
  Tensor dqkv = torch::stable::new_empty(qkv, {images, tokens, 3, heads, width});
  const OnDevice device(qkv);
  with_float_type(qkv, "query_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    const Problem<T> p = problem_of<T>(qkv, raw, crop);
    const size_t per_tile = kTile * (2 * Staged<T>::kBytes + kChunkBytes), stages = kStages * kStageBytes<T>;
    const int fitting = int((device.shared_memory_limit() - stages) / per_tile);
    const int group_tiles = std::min({kBackwardWarps * kWarpTiles<T>, fitting, p.layout.tiles()});
    const int64_t groups = (p.layout.tiles() + group_tiles - 1) / group_tiles;
    Tensor dq_parts = torch::stable::new_empty(qkv, {groups > 1 ? groups : 0, images, tokens, heads, width}, ScalarType::Float);
    auto* dq_parts_ptr = groups > 1 ? static_cast<float*>(dq_parts.data_ptr()) : nullptr;
    auto* dqkv_ptr = static_cast<T*>(dqkv.data_ptr());
    const Backward<T> b{p, heads_of<T>(grad, 2), heads_of<T>(out, 2), static_cast<const float*>(lse.data_ptr()), dqkv_ptr,
                        dq_parts_ptr, group_tiles};
    launch(device, backward_kernel<T>, dim3{blocks_of(images * heads), unsigned(groups), 1}, kBackwardWarps * kWarpLanes,
           group_tiles * per_tile + stages, b);
    if (groups > 1)
      launch(device, total_kernel<T>, dim3{blocks_of(images * tokens), 1, 1}, 128, 0, static_cast<const float*>(dq_parts_ptr),
             int(groups), images * tokens, int(heads * width), p.scale, dqkv_ptr);
  });
  return dqkv;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) {
  m.impl("query_attention_fwd", TORCH_BOX(&patchlight::query_attention_fwd));
  m.impl("query_attention_bwd", TORCH_BOX(&patchlight::query_attention_bwd));
}
