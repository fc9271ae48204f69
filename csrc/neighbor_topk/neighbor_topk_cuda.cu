// neighbor_topk on the GPU. Two kernels:
//   window  3x3 and 5x5 windows: a block holds a band of grid rows (the whole grid if it is small), reads each feature once
//           in 128-byte chunks, and multiplies each pair of neighbors once. 16-bit features use tensor cores on 16 patches of a
//           grid row against the row itself and the rows below; of each 16x24 tile only the diagonals in the window are kept.
//   gram    any window and all patches: 32 patches per warp against 64 candidates at a time, with a running top-k per patch.
// Norms are made by the same products. All sums are fp32.
#include <climits>

#include "../chunk.h"
#include "../device.h"
#include "../mma.h"

namespace patchlight {
namespace {

constexpr float kEps = 1e-12f;     // norms below this count as this
constexpr float kNanRank = -2.0f;  // below every cosine; missing candidates get -inf

struct Grid {
  int height, width;
  bool wrap;
  __device__ int patches() const { return height * width; }
};

template <class T>
struct Rows {  // x[image, patch, :]
  const T* x;
  int64_t stride_image, stride_patch;
  int channels;
  bool aligned;
  __device__ const T* row(int image, int patch) const { return x + image * stride_image + patch * stride_patch; }
  __device__ int chunks() const { return (channels + kChunkChannels<T> - 1) / kChunkChannels<T>; }
};

struct Selection {
  int32_t* index;  // [images, patches, k]
  float* score;    // the same, or null
  int k;
};

__device__ __forceinline__ int modulo(int a, int size) { return (a % size + size) % size; }
__device__ __forceinline__ float negative_infinity() { return -INFINITY; }
__device__ __forceinline__ bool is_better(float rank, int index, float other, int other_index) {
  return rank > other || (rank == other && index < other_index);
}
__device__ __forceinline__ float rank_of(float cosine) { return cosine != cosine ? kNanRank : cosine; }
__device__ __forceinline__ float inverse_norm(float squares) {  // NaN if the squares overflowed
  return squares < INFINITY ? 1.0f / fmaxf(sqrtf(squares), kEps) : NAN;
}

// ------------------------------------------------------------------------------------------------ window

constexpr int kStages = 3;
constexpr int kTilePatches = 16;
constexpr int kTilesPerWarp = 2;

template <int R>
struct Window {
  static constexpr int kSide = 2 * R + 1;
  static constexpr int kPlaces = kSide * kSide - 1;
  static constexpr int kDots = kPlaces / 2 + 1;                           // a patch's own square, then the later half window
  static constexpr int kColumnTiles = (kTilePatches + 2 * R + 7) / 8;     // 8 candidates each
  static constexpr int kTiles = kColumnTiles * (R + 1);                   // over the rows dy = 0..R
  static constexpr int kMaxWarps = R == 1 ? 16 : 8;                       // the wider window needs more registers
  __device__ static int slot(int dy, int dx) { return dy == 0 ? dx : R + 1 + (dy - 1) * kSide + dx + R; }
};

// The grid rows of a block: `rows` of them from `first` on, and R more on either side unless it has the whole grid.
struct Band {
  int first, rows, loaded;
  bool whole;
  template <int R>
  __device__ static Band of(int band_rows, int height) {
    const bool whole = band_rows >= height;
    const int first = whole ? 0 : int(blockIdx.x) * band_rows;
    const int rows = whole ? height : (height - first < band_rows ? height - first : band_rows);
    return {first, rows, whole ? height : rows + 2 * R, whole};
  }
  __device__ int halo(int radius) const { return whole ? 0 : radius; }
  // The loaded row `dy` rows below; for rows that are not loaded some other row, whose products are never read.
  __device__ int row_below(int row, int dy) const {
    return whole ? (row + dy) % loaded : (row + dy < loaded ? row + dy : loaded - 1);
  }
};

template <class T, int R>
struct WindowTile {  // 16-bit features: tensor cores
  float sum[Window<R>::kTiles][4] = {};
  int own, other[(Window<R>::kTiles + 1) / 2];

  // Loaded patches whose rows this lane addresses: 16 of its own tile, and 2 x 8 candidates per load.
  __device__ void set_rows(const Grid& grid, const Band& band, int row, int column) {
    const int lane = threadIdx.x % kWarpLanes;
    own = row * grid.width + min_int(column + lane % 16, grid.width - 1);
#pragma unroll
    for (int pair = 0; pair < (Window<R>::kTiles + 1) / 2; ++pair) {
      const int tile = min_int(2 * pair + lane / 16, Window<R>::kTiles - 1);
      const int at = column - R + tile % Window<R>::kColumnTiles * 8 + lane % 8;
      other[pair] = band.row_below(row, tile / Window<R>::kColumnTiles) * grid.width + modulo(at, grid.width);
    }
  }

  __device__ void multiply(const char* chunk) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int step = 0; step < kChunkChannels<T> / 16; ++step) {
      uint32_t a[4];
      load_matrices(a, chunk + chunk_offset(own, 2 * step + lane / 16));
#pragma unroll
      for (int pair = 0; pair < (Window<R>::kTiles + 1) / 2; ++pair) {
        uint32_t b[4];
        load_matrices(b, chunk + chunk_offset(other[pair], 2 * step + lane / 8 % 2));
        multiply_add<T>(sum[2 * pair], a, b[0], b[1]);
        if (2 * pair + 1 < Window<R>::kTiles) multiply_add<T>(sum[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  __device__ void keep(const Grid& grid, int row, int column, float* dots) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int tile = 0; tile < Window<R>::kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = lane / 4 + i / 2 * 8, dy = tile / Window<R>::kColumnTiles;
        const int dx = tile % Window<R>::kColumnTiles * 8 + lane % 4 * 2 + i % 2 - R - m;
        const bool in_window = column + m < grid.width && dx <= R && dx >= (dy == 0 ? 0 : -R);
        if (in_window) dots[(row * grid.width + column + m) * Window<R>::kDots + Window<R>::slot(dy, dx)] = sum[tile][i];
      }
  }

};

template <int R>
struct WindowTile<float, R> {  // fp32 features: two lanes per patch, each with half of every chunk
  float sum[Window<R>::kDots] = {};
  int own, other[Window<R>::kDots];

  __device__ void set_rows(const Grid& grid, const Band& band, int row, int column) {
    const int at = column + int(threadIdx.x) % 16;
    const int x = at < grid.width ? at : grid.width - 1;
    own = row * grid.width + x;
#pragma unroll
    for (int dy = 0; dy <= R; ++dy)
#pragma unroll
      for (int dx = dy == 0 ? 0 : -R; dx <= R; ++dx)
        other[Window<R>::slot(dy, dx)] = band.row_below(row, dy) * grid.width + modulo(x + dx, grid.width);
  }

  __device__ void multiply(const char* chunk) {
    const int half = threadIdx.x % kWarpLanes / 16;
#pragma unroll
    for (int u = 0; u < kUnits / 2; ++u) {
      const int unit = half * (kUnits / 2) + u;
      const float4 a = *reinterpret_cast<const float4*>(chunk + chunk_offset(own, unit));
#pragma unroll
      for (int slot = 0; slot < Window<R>::kDots; ++slot) {
        const float4 b = *reinterpret_cast<const float4*>(chunk + chunk_offset(other[slot], unit));
        sum[slot] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
  }

  __device__ void keep(const Grid& grid, int row, int column, float* dots) {
    const int m = threadIdx.x % 16;
#pragma unroll
    for (int slot = 0; slot < Window<R>::kDots; ++slot) {
      const float total = sum[slot] + __shfl_xor_sync(kAllLanes, sum[slot], 16);
      if (threadIdx.x % kWarpLanes < 16 && column + m < grid.width)
        dots[(row * grid.width + column + m) * Window<R>::kDots + slot] = total;
    }
  }
};

template <class T>
__device__ void stage_band(char* stage, const Rows<T>& rows, const Grid& grid, const Band& band, int radius, int chunk) {
  const int units = band.loaded * grid.width * kUnits;
  for (int i = threadIdx.x; i < units; i += blockDim.x) {
    const int patch = i / kUnits, unit = i % kUnits, row = patch / grid.width;
    const int y = band.first - band.halo(radius) + row;
    if (!grid.wrap && (y < 0 || y >= grid.height)) continue;  // beyond a clipped border: never read
    const int source = modulo(y, grid.height) * grid.width + patch % grid.width;
    stage_unit(stage + chunk_offset(patch, unit), rows.row(blockIdx.y, source),
               chunk * kChunkChannels<T> + unit * kUnitBytes / int(sizeof(T)), rows.channels, rows.aligned);
  }
}

// One thread per patch: its window from the table of dots; a rank is the number of candidates that are better.
template <int R>
__device__ void select_window(const float* dots, const Grid& grid, const Band& band, int local, const Selection& out) {
  constexpr int kPlaces = Window<R>::kPlaces, kDots = Window<R>::kDots;
  const int row = local / grid.width + band.halo(R), x = local % grid.width, y = band.first + local / grid.width;
  const int own = row * grid.width + x;
  float cosine[kPlaces], rank[kPlaces];
  int candidate[kPlaces];
  int place = 0;
#pragma unroll
  for (int dy = -R; dy <= R; ++dy)
#pragma unroll
    for (int dx = -R; dx <= R; ++dx) {
      if (dy == 0 && dx == 0) continue;
      const bool inside = grid.wrap || (y + dy >= 0 && y + dy < grid.height && x + dx >= 0 && x + dx < grid.width);
      const int other_row = band.whole ? modulo(row + dy, band.loaded) : row + dy;
      const int other = other_row * grid.width + modulo(x + dx, grid.width);
      const bool later = dy > 0 || (dy == 0 && dx > 0);
      const float dot = dots[(later ? own : other) * kDots + (later ? Window<R>::slot(dy, dx) : Window<R>::slot(-dy, -dx))];
      cosine[place] = inside ? dot * dots[own * kDots] * dots[other * kDots] : negative_infinity();
      rank[place] = rank_of(cosine[place]);
      const int patch = modulo(y + dy, grid.height) * grid.width + modulo(x + dx, grid.width);
      candidate[place] = inside ? patch : grid.patches() + place;  // each its own: no two places may have one rank
      ++place;
    }
  const int64_t base = (int64_t(blockIdx.y) * grid.patches() + y * grid.width + x) * out.k;
#pragma unroll
  for (int c = 0; c < kPlaces; ++c) {
    int before = 0;
#pragma unroll
    for (int o = 0; o < kPlaces; ++o) before += is_better(rank[o], candidate[o], rank[c], candidate[c]);
    if (before >= out.k) continue;
    out.index[base + before] = cosine[c] == negative_infinity() ? -1 : candidate[c];
    if (out.score) out.score[base + before] = cosine[c];
  }
}

template <class T, int R>
__global__ void __launch_bounds__(Window<R>::kMaxWarps * kWarpLanes, 1) window_kernel(Rows<T> rows, Grid grid, int band_rows, Selection out) {
  const Band band = Band::of<R>(band_rows, grid.height);
  const int patches = band.loaded * grid.width, warps = blockDim.x / kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int row_tiles = (grid.width + kTilePatches - 1) / kTilePatches, tiles = band.loaded * row_tiles;
  const int stage_bytes = patches * kChunkBytes;
  char* stages = shared_memory();
  float* dots = reinterpret_cast<float*>(stages + kStages * stage_bytes);

  WindowTile<T, R> tile[kTilesPerWarp];
#pragma unroll
  for (int i = 0; i < kTilesPerWarp; ++i) {
    const int number = warp + i * warps;
    if (number < tiles) tile[i].set_rows(grid, band, number / row_tiles, number % row_tiles * kTilePatches);
  }

  const int chunks = rows.chunks();
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    if (ahead < chunks) stage_band(stages + ahead * stage_bytes, rows, grid, band, R, ahead);
    commit_copies();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the chunk is complete, and all warps are done with the stage that is filled next
    const int next = chunk + kStages - 1;
    if (next < chunks) stage_band(stages + next % kStages * stage_bytes, rows, grid, band, R, next);
    commit_copies();
#pragma unroll
    for (int i = 0; i < kTilesPerWarp; ++i)
      if (warp + i * warps < tiles) tile[i].multiply(stages + chunk % kStages * stage_bytes);
  }
#pragma unroll
  for (int i = 0; i < kTilesPerWarp; ++i) {
    const int number = warp + i * warps;
    if (number < tiles) tile[i].keep(grid, number / row_tiles, number % row_tiles * kTilePatches, dots);
  }
  __syncthreads();
  for (int p = threadIdx.x; p < patches; p += blockDim.x) dots[p * Window<R>::kDots] = inverse_norm(dots[p * Window<R>::kDots]);
  __syncthreads();
  for (int p = threadIdx.x; p < band.rows * grid.width; p += blockDim.x) select_window<R>(dots, grid, band, p, out);
}

// The band with the most rows that the warps and the shared memory can take, or 0 if not even one row fits.
template <int R>
int window_band(const Grid& grid, size_t shared_limit) {
  const size_t budget = std::min(shared_limit, size_t(112 * 1024));  // two blocks on the larger GPUs
  const int row_tiles = (grid.width + kTilePatches - 1) / kTilePatches;
  const auto fits = [&](int loaded) {
    return loaded * row_tiles <= Window<R>::kMaxWarps * kTilesPerWarp &&
           size_t(loaded) * grid.width * (kStages * kChunkBytes + Window<R>::kDots * sizeof(float)) <= budget;
  };
  if (grid.wrap && (grid.height < Window<R>::kSide || grid.width < Window<R>::kSide)) return 0;  // a patch would be found twice
  if (fits(grid.height)) return grid.height;
  int rows = 0;
  while (rows < grid.height && fits(rows + 1 + 2 * R)) ++rows;
  if (rows == 0) return 0;
  const int bands = (grid.height + rows - 1) / rows;
  return (grid.height + bands - 1) / bands;  // even bands
}

template <class T, int R>
void launch_window(const OnDevice& device, const Rows<T>& rows, const Grid& grid, int images, int band, const Selection& out) {
  const int loaded = band >= grid.height ? grid.height : band + 2 * R;
  const int tiles = loaded * ((grid.width + kTilePatches - 1) / kTilePatches);
  const int threads = (tiles + kTilesPerWarp - 1) / kTilesPerWarp * kWarpLanes;
  const size_t shared = size_t(loaded) * grid.width * (kStages * kChunkBytes + Window<R>::kDots * sizeof(float));
  const dim3 blocks{unsigned((grid.height + band - 1) / band), unsigned(images), 1};
  launch(device, window_kernel<T, R>, blocks, threads, shared, rows, grid, band, out);
}

// -------------------------------------------------------------------------------------------------- gram

constexpr int kGramRows = 32;        // patches per warp
constexpr int kGramCandidates = 64;  // at a time
constexpr int kScoreStride = kGramCandidates + 1;

template <class T>
struct GramTile {  // 16-bit features: 2 x 8 tensor-core tiles per warp
  float sum[2][8][4];
  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = 0;
  }
  __device__ void multiply(const char* own, const char* candidates, int first) {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int step = 0; step < kChunkChannels<T> / 16; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrices(a[m], own + chunk_offset(first + m * 16 + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t b[4];
        load_matrices(b, candidates + chunk_offset(pair * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(sum[m][2 * pair], a[m], b[0], b[1]);
          multiply_add<T>(sum[m][2 * pair + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  __device__ void store(float* scores, int first) const {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[(first + m * 16 + lane / 4 + i / 2 * 8) * kScoreStride + n * 8 + lane % 4 * 2 + i % 2] = sum[m][n][i];
  }
};

template <>
struct GramTile<float> {  // fp32 features: 8 x 8 products per lane, rows and columns interleaved over the warp
  float sum[8][8];
  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n) sum[m][n] = 0;
  }
  __device__ void multiply(const char* own, const char* candidates, int first) {
    const int lane = threadIdx.x % kWarpLanes;
    for (int unit = 0; unit < kUnits; ++unit) {
      float4 b[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) b[n] = *reinterpret_cast<const float4*>(candidates + chunk_offset(lane % 8 + 8 * n, unit));
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        const float4 a = *reinterpret_cast<const float4*>(own + chunk_offset(first + lane / 8 + 4 * m, unit));
#pragma unroll
        for (int n = 0; n < 8; ++n) sum[m][n] += a.x * b[n].x + a.y * b[n].y + a.z * b[n].z + a.w * b[n].w;
      }
    }
  }
  __device__ void store(float* scores, int first) const {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n) scores[(first + lane / 8 + 4 * m) * kScoreStride + lane % 8 + 8 * n] = sum[m][n];
  }
};

// The best KEEP candidates so far, in registers.
template <int KEEP>
struct TopK {
  float rank[KEEP], cosine[KEEP];
  int index[KEEP];
  __device__ TopK() {
#pragma unroll
    for (int s = 0; s < KEEP; ++s) rank[s] = cosine[s] = negative_infinity(), index[s] = INT_MAX;
  }
  __device__ void offer(float value, int candidate) {
    float r = rank_of(value);
    if (!is_better(r, candidate, rank[KEEP - 1], index[KEEP - 1])) return;
#pragma unroll
    for (int s = 0; s < KEEP; ++s) {
      if (!is_better(r, candidate, rank[s], index[s])) continue;
      const float old_rank = rank[s], old_cosine = cosine[s];
      const int old_index = index[s];
      rank[s] = r, cosine[s] = value, index[s] = candidate;
      r = old_rank, value = old_cosine, candidate = old_index;
    }
  }
};

__device__ __forceinline__ int grid_distance(int a, int b, int size, bool wrap) {
  const int distance = a < b ? b - a : a - b;
  return wrap && size - distance < distance ? size - distance : distance;
}

// Whether any candidate of [from, to] can be within `radius` rows of any patch of [first, last].
__device__ __forceinline__ bool rows_within(const Grid& grid, int radius, int first, int last, int from, int to) {
  if (radius < 0) return true;
  const int top = first / grid.width - radius, bottom = last / grid.width + radius;
  const int high = from / grid.width, low = to / grid.width;
  const bool without_wrap = high <= bottom && low >= top;
  if (!grid.wrap) return without_wrap;
  return without_wrap || low >= top + grid.height || high <= bottom - grid.height;
}

template <class T>
__device__ void stage_rows(char* stage, const Rows<T>& rows, int patches, int first, int count, int chunk) {
  for (int i = threadIdx.x; i < count * kUnits; i += blockDim.x) {
    const int row = i / kUnits, unit = i % kUnits;
    const int patch = first + row < patches ? first + row : patches - 1;
    stage_unit(stage + chunk_offset(row, unit), rows.row(blockIdx.y, patch),
               chunk * kChunkChannels<T> + unit * kUnitBytes / int(sizeof(T)), rows.channels, rows.aligned);
  }
}

template <class T, int KEEP>
__global__ void __launch_bounds__(128) gram_kernel(Rows<T> rows, Grid grid, int radius, Selection out) {
  const int threads = blockDim.x, patches = grid.patches(), chunks = rows.chunks();
  const int first = blockIdx.x * threads, own_patch = first + threadIdx.x;  // a thread selects for one patch
  const int own_bytes = threads * kChunkBytes, stage_bytes = kGramCandidates * kChunkBytes;
  char* own = shared_memory();                                         // [chunks][threads] rows, loaded once
  char* stages = own + chunks * own_bytes;                             // [kStages][64] candidate rows
  float* scores = reinterpret_cast<float*>(stages + kStages * stage_bytes);
  float* scale = scores + threads * kScoreStride;                      // inverse norms of the 64 candidates
  GramTile<T> tile;
  TopK<KEEP> best;
  float own_scale = 0;

  for (int chunk = 0; chunk < chunks; ++chunk) stage_rows(own + chunk * own_bytes, rows, patches, first, threads, chunk);
  commit_copies();
  for (int from = 0; from < patches; from += kGramCandidates) {
    const int to = from + kGramCandidates < patches ? from + kGramCandidates : patches;
    // The same for all threads of the block, which wait for one another below. The first candidates are never left out.
    if (from > 0 && !rows_within(grid, radius, first, first + threads - 1, from, to - 1)) continue;
    tile.clear();
    float squares[kGramCandidates / kGramRows] = {};
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      if (ahead < chunks) stage_rows(stages + ahead * stage_bytes, rows, patches, from, kGramCandidates, ahead);
      commit_copies();
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_copies<kStages - 2>();
      __syncthreads();  // the chunk is complete, and all warps are done with the stage that is filled next
      const int next = chunk + kStages - 1;
      if (next < chunks) stage_rows(stages + next % kStages * stage_bytes, rows, patches, from, kGramCandidates, next);
      commit_copies();
      const char* stage = stages + chunk % kStages * stage_bytes;
      tile.multiply(own + chunk * own_bytes, stage, threadIdx.x / kWarpLanes * kGramRows);
#pragma unroll
      for (int i = 0; i < kGramCandidates / kGramRows; ++i)
        if (threadIdx.x + i * threads < kGramCandidates)
          for (int unit = 0; unit < kUnits; ++unit)
            squares[i] += unit_squares<T>(stage + chunk_offset(threadIdx.x + i * threads, unit));
    }
    if (from == 0) {  // all of the own rows are loaded now
      float total = 0;
      for (int chunk = 0; chunk < chunks; ++chunk)
        for (int unit = 0; unit < kUnits; ++unit)
          total += unit_squares<T>(own + chunk * own_bytes + chunk_offset(threadIdx.x, unit));
      own_scale = inverse_norm(total);
    }
    tile.store(scores, threadIdx.x / kWarpLanes * kGramRows);
#pragma unroll
    for (int i = 0; i < kGramCandidates / kGramRows; ++i)
      if (threadIdx.x + i * threads < kGramCandidates) scale[threadIdx.x + i * threads] = inverse_norm(squares[i]);
    __syncthreads();
    if (own_patch < patches)
      for (int candidate = from; candidate < to; ++candidate) {
        const bool inside = radius < 0 || (grid_distance(candidate / grid.width, own_patch / grid.width, grid.height, grid.wrap) <= radius &&
                                           grid_distance(candidate % grid.width, own_patch % grid.width, grid.width, grid.wrap) <= radius);
        if (!inside || candidate == own_patch) continue;
        best.offer(scores[threadIdx.x * kScoreStride + candidate - from] * own_scale * scale[candidate - from], candidate);
      }
    __syncthreads();  // scores and stages may be overwritten
  }
  if (own_patch >= patches) return;
  const int64_t base = (int64_t(blockIdx.y) * patches + own_patch) * out.k;
#pragma unroll
  for (int s = 0; s < KEEP; ++s) {
    if (s >= out.k) continue;
    out.index[base + s] = best.index[s] == INT_MAX ? -1 : best.index[s];
    if (out.score) out.score[base + s] = best.cosine[s];
  }
}

template <class T, int KEEP>
void launch_gram(const OnDevice& device, const Rows<T>& rows, const Grid& grid, int radius, int images, const Selection& out) {
  const int patches = grid.height * grid.width;
  const size_t chunks = (rows.channels * sizeof(T) + kChunkBytes - 1) / kChunkBytes;
  const auto shared = [&](int threads) {
    return threads * (chunks * kChunkBytes + kScoreStride * sizeof(float)) + kStages * kGramCandidates * kChunkBytes +
           kGramCandidates * sizeof(float);
  };
  int threads = 128;
  while (threads > kGramRows && (shared(threads) > device.shared_memory_limit() || patches <= threads / 2)) threads /= 2;
  STD_TORCH_CHECK(shared(threads) <= device.shared_memory_limit(), "neighbor_topk: rows of ", rows.channels,
                  " channels need ", shared(threads), " bytes of shared memory and this GPU has ", device.shared_memory_limit(),
                  "; use force(neighbor_topk='triton').");
  const dim3 blocks{unsigned((patches + threads - 1) / threads), unsigned(images), 1};
  launch(device, gram_kernel<T, KEEP>, blocks, threads, shared(threads), rows, grid, radius, out);
}

// ------------------------------------------------------------------------------------------------ launch

std::tuple<Tensor, Tensor> neighbor_topk_fwd(
    const Tensor& x, int64_t height, int64_t width, int64_t k, int64_t radius, bool wrap, bool scores) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == height * width && x.stride(2) == 1 && k >= 1 && k <= 32,
                  "neighbor_topk: x must be [images, height * width, channels] with dense rows, k in 1..32, got another layout; call the Python function.");
  const int64_t images = x.size(0), patches = x.size(1);
  Tensor index = torch::stable::new_empty(x, {images, patches, k}, ScalarType::Int);
  Tensor score = torch::stable::new_empty(
      x, scores ? std::vector<int64_t>{images, patches, k} : std::vector<int64_t>{0}, ScalarType::Float);
  const OnDevice device(x);
  const Grid grid{int(height), int(width), wrap};
  Selection out{static_cast<int32_t*>(index.data_ptr()), scores ? static_cast<float*>(score.data_ptr()) : nullptr, int(k)};
  const int band = radius == 1   ? window_band<1>(grid, device.shared_memory_limit())
                   : radius == 2 ? window_band<2>(grid, device.shared_memory_limit())
                                 : 0;
  with_float_type(x, "neighbor_topk", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x_ptr = static_cast<const T*>(x.data_ptr());
    Rows<T> rows{x_ptr, x.stride(0), x.stride(1), int(x.size(2)), rows_aligned(x_ptr, {x.stride(0), x.stride(1)})};
    for (int64_t left = images; left > 0; left -= kMaxBlocksY) {  // images are along y
      const int now = int(std::min<int64_t>(left, kMaxBlocksY));
      if (band && radius == 1)
        launch_window<T, 1>(device, rows, grid, now, band, out);
      else if (band)
        launch_window<T, 2>(device, rows, grid, now, band, out);
      else if (k <= 8)
        launch_gram<T, 8>(device, rows, grid, int(radius), now, out);
      else
        launch_gram<T, 32>(device, rows, grid, int(radius), now, out);
      rows.x += now * rows.stride_image;
      out.index += now * patches * k;
      if (out.score) out.score += now * patches * k;
    }
  });
  return {index, score};
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) { m.impl("neighbor_topk_fwd", TORCH_BOX(&patchlight::neighbor_topk_fwd)); }
