// prototype_ce on the GPU.
//   stream    a block keeps the rows of some positions, of all views, in shared memory; tiles of 64 prototypes of both branches
//             are loaded in 128-byte chunks through asynchronous stages. A warp owns 32 rows. Teacher warps write their
//             probabilities to shared memory; student warps then read those of their own positions. The rest is a task:
//     Statistics      a tile's sums and the student's mean logit under each teacher, final for that tile
//     LogitGradients  the gradient of the student's logits, from the sums of all tiles
//   read      the same tasks with dot products that are in memory already
//   merge     combines the Statistics of all tiles to the loss of 32 positions of one view
//   total     sums those losses
//   whole     from dot products with all prototypes: everything about one position, each dot product read once
// Logits are in units of log2 and never leave the registers; all sums are fp32 and in a fixed order.
#include <cfloat>
#include <optional>
#include <type_traits>

#include "../device.h"
#include "../warp_tile.h"

namespace patchlight {
namespace {

constexpr int kStages = 3;
constexpr int kMaxWarps = 8;                                     // leaves 255 registers a thread; 64 of them are sums
constexpr int kStageBytes = 2 * kTileColumns * kChunkBytes;      // a chunk of 64 prototypes of either branch
constexpr int kProbabilityStride = kTileColumns + 8;             // of a row: lanes of four rows then use different banks
constexpr int kScratchRows = 16;                                 // of gradients that a warp stores at a time

template <class T>
struct Branch {
  const T* rows;     // [views, positions, channels]
  const T* weights;  // [prototypes, channels]
  int64_t view_stride, row_stride, weight_stride;
  bool rows_aligned, weights_aligned;
  int views;
};

// What dot products and the bias are multiplied by, to be logits in units of log2.
struct Scales {
  float student, teacher, bias;
};

struct ScaleSource {
  float student, teacher;  // 1 / (temperature ln 2)
  const double* divisor;   // the teacher's is divided by this, if any
  const float* units;      // of the student's and the teacher's dot products, if any
  __device__ Scales load() const {
    const float bias = divisor ? float(teacher / *divisor) : teacher;
    return {units ? student * units[0] : student, units ? bias * units[1] : bias, bias};
  }
};

template <class T>
struct Problem {  // of dot products: the rows are [views, positions, prototypes], and there are no weights and no channels
  Branch<T> student, teacher;
  ScaleSource scales;
  const float* bias;  // [prototypes] or null
  int positions, channels, prototypes;
  __host__ __device__ int chunks() const { return (channels + kChunkChannels<T> - 1) / kChunkChannels<T>; }
  __host__ __device__ int tiles() const { return (prototypes + kTileColumns - 1) / kTileColumns; }
};

// The rows of a block. A row's slot is view * positions + position, for the teacher and then for the student.
struct Plan {
  int log2_positions, views;  // of a block; views of the student, as all views of the teacher are in it
  int teacher_warps, student_warps;
  int tiles;  // of prototypes for a block
  __host__ __device__ int positions() const { return 1 << log2_positions; }
  __device__ int first_position() const { return int(blockIdx.x) << log2_positions; }
  __device__ int view(int slot) const { return slot >> log2_positions; }
  __device__ int position(int slot) const { return slot & (positions() - 1); }
  __host__ __device__ int warps() const { return teacher_warps + student_warps; }
};

// A row of a warp's tile.
struct RowPosition {
  int view, position;  // of the problem
  bool exists;
};

struct TilePosition {  // of a warp's tile
  Plan plan;
  int first_slot;    // of the warp, within its branch
  int first_view, views_here, views;  // the block's first view, how many it has at most, and how many the branch has
  int positions;     // of the problem
  int tile, prototypes;
  Scales scales;
  // The row of probabilities of teacher view t for the position of a student's row.
  __device__ int partner(int t, int row) const { return (t << plan.log2_positions) + plan.position(first_slot + row); }
  __device__ RowPosition place(int row) const {
    const int in_group = plan.view(first_slot + row), view = first_view + in_group;
    const int position = plan.first_position() + plan.position(first_slot + row);
    return {view, position, in_group < views_here && view < views && position < positions};
  }
  __device__ bool has(int column) const { return tile * kTileColumns + column < prototypes; }
};

template <class T>
__device__ void stage_rows(char* out, const Branch<T>& branch, const Problem<T>& p, const Plan& plan, int first_view, int slots,
                           int all_slots) {
  const int units = p.chunks() * slots * kUnits;
  for (int i = threadIdx.x; i < units; i += blockDim.x) {
    const int unit = i % kUnits, slot = i / kUnits % slots, chunk = i / kUnits / slots;
    int view = first_view + plan.view(slot), position = plan.first_position() + plan.position(slot);
    view = view < branch.views ? view : branch.views - 1;  // missing rows repeat the last one
    position = position < p.positions ? position : p.positions - 1;
    stage_unit(out + chunk * all_slots * kChunkBytes + chunk_offset(slot, unit),
               branch.rows + view * branch.view_stride + position * branch.row_stride,
               chunk * kChunkChannels<T> + unit * kUnitBytes / int(sizeof(T)), p.channels, branch.rows_aligned);
  }
}

// A chunk of a tile's prototypes, the teacher's and then the student's.
template <class T>
__device__ void stage_weights(char* stage, const Problem<T>& p, int tile, int chunk) {
  for (int i = threadIdx.x; i < 2 * kTileColumns * kUnits; i += blockDim.x) {
    const int unit = i % kUnits, row = i / kUnits % kTileColumns, side = i / kUnits / kTileColumns;
    const Branch<T>& branch = side ? p.student : p.teacher;
    const int k = tile * kTileColumns + row;
    stage_unit(stage + side * kTileColumns * kChunkBytes + chunk_offset(row, unit),
               branch.weights + (k < p.prototypes ? k : p.prototypes - 1) * branch.weight_stride,
               chunk * kChunkChannels<T> + unit * kUnitBytes / int(sizeof(T)), p.channels, branch.weights_aligned);
  }
}

// The teacher's logit from a lane's sum; -inf behind the last prototype.
template <class T>
__device__ __forceinline__ float teacher_logit(const Problem<T>& p, const TilePosition& where, float dot, int column) {
  const int k = where.tile * kTileColumns + column;
  const float bias = p.bias && where.has(column) ? p.bias[k] * where.scales.bias : 0.0f;
  return where.has(column) ? dot * where.scales.teacher + bias : -INFINITY;
}

// ------------------------------------------------------------------------------------------------- statistics

// The maximum of a row of the tile; finite even if all logits are -inf.
template <class Tile>
__device__ __forceinline__ float highest_of(Tile& tile, const TilePosition& where, int i) {
  float highest = -FLT_MAX;
#pragma unroll
  for (int j = 0; j < Tile::kColumns; ++j) highest = fmaxf(highest, where.has(Tile::column(j)) ? tile.at(i, j) : -FLT_MAX);
  return row_max<Tile>(highest);
}

struct Statistics {
  float* student;   // [tiles, S, R] log2 of the sum of powers
  float* teacher;   // [tiles, T, R]
  float* expected;  // [tiles, T, S, R] the student's mean logit under the teacher's probabilities within the tile

  static size_t scratch_bytes(int, size_t) { return 0; }

  template <class T, int M>
  __device__ void teacher_tile(WarpTile<T, M>& tile, const Problem<T>& p, const TilePosition& where, float* probabilities) const {
    using Tile = WarpTile<T, M>;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) tile.at(i, j) = teacher_logit(p, where, tile.at(i, j), Tile::column(j));
      const float highest = highest_of(tile, where, i);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sum += tile.at(i, j) = exp2f(tile.at(i, j) - highest);
      sum = row_sum<Tile>(sum);
      const float inverse = sum > 0 ? 1 / sum : sum;  // 0, or NaN
      float* row = probabilities + (where.first_slot + Tile::row(i)) * kProbabilityStride;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) row[Tile::column(j)] = tile.at(i, j) * inverse;
      const RowPosition place = where.place(Tile::row(i));
      if (place.exists && blockIdx.z == 0 && threadIdx.x % Tile::kSharers == 0)
        teacher[(int64_t(where.tile) * p.teacher.views + place.view) * p.positions + place.position] = highest + log2f(sum);
    }
  }

  template <class T, int M>
  __device__ void student_tile(WarpTile<T, M>& tile, const Problem<T>& p, const TilePosition& where, const float* probabilities, char*) const {
    using Tile = WarpTile<T, M>;
    const bool writes = threadIdx.x % Tile::kSharers == 0;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const RowPosition place = where.place(Tile::row(i));
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) tile.at(i, j) *= where.scales.student;
      for (int t = 0; t < p.teacher.views; ++t) {
        const float* row = probabilities + where.partner(t, Tile::row(i)) * kProbabilityStride;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) sum += row[Tile::column(j)] * tile.at(i, j);
        sum = row_sum<Tile>(sum);
        const int64_t pair = (int64_t(where.tile) * p.teacher.views + t) * p.student.views + place.view;
        if (place.exists && writes) expected[pair * p.positions + place.position] = sum;
      }
      const float highest = highest_of(tile, where, i);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sum += where.has(Tile::column(j)) ? exp2f(tile.at(i, j) - highest) : 0.0f;
      sum = row_sum<Tile>(sum);
      if (place.exists && writes)
        student[(int64_t(where.tile) * p.student.views + place.view) * p.positions + place.position] = highest + log2f(sum);
    }
  }
};

// ------------------------------------------------------------------------------------------------- gradients of logits

// Writes 16 bytes to global memory, or as many values as are left.
template <class T>
__device__ __forceinline__ void store_unit(T* out, const T* shared, int left, bool aligned) {
  constexpr int kValues = kUnitBytes / int(sizeof(T));
  if (aligned && left >= kValues) {
    *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(shared);
  } else {
    for (int i = 0; i < kValues && i < left; ++i) out[i] = shared[i];
  }
}

template <class Out>
struct LogitGradients {
  const float* student;  // [S, R] log2 of the sum of powers
  const float* teacher;  // [T, R]
  const float* pairs;    // [T, S]
  const float* weights;  // [R]
  const float* unit;     // a gradient of 1 is stored as this
  Out* gradient;         // [S, R, K]

  static constexpr int kStride = kTileColumns + kUnitBytes / int(sizeof(Out));  // of the scratch
  static size_t scratch_bytes(int warps, size_t) { return size_t(warps) * kScratchRows * kStride * sizeof(Out); }

  template <class T, int M>
  __device__ void teacher_tile(WarpTile<T, M>& tile, const Problem<T>& p, const TilePosition& where, float* probabilities) const {
    using Tile = WarpTile<T, M>;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const RowPosition place = where.place(Tile::row(i));
      const float log2_sum = place.exists ? teacher[int64_t(place.view) * p.positions + place.position] : 0.0f;
      float* row = probabilities + (where.first_slot + Tile::row(i)) * kProbabilityStride;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j)
        row[Tile::column(j)] = exp2f(teacher_logit(p, where, tile.at(i, j), Tile::column(j)) - log2_sum);
    }
  }

  template <class T, int M>
  __device__ void student_tile(WarpTile<T, M>& tile, const Problem<T>& p, const TilePosition& where, const float* probabilities,
                        char* scratch) const {
    using Tile = WarpTile<T, M>;
    Out* out = reinterpret_cast<Out*>(scratch) + where.first_slot / kTileRows * kScratchRows * kStride;
#pragma unroll
    for (int part = 0; part < M; ++part) {
#pragma unroll
      for (int i = part * Tile::kRows / M; i < (part + 1) * Tile::kRows / M; ++i) {
        const RowPosition place = where.place(Tile::row(i));
        const float log2_sum = place.exists ? student[int64_t(place.view) * p.positions + place.position] : 0.0f;
        const float weight = place.exists ? weights[place.position] * *unit : 0.0f;
        float sum[Tile::kColumns] = {};
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) tile.at(i, j) = exp2f(tile.at(i, j) * where.scales.student - log2_sum);
        for (int t = 0; t < p.teacher.views; ++t) {
          const float* row = probabilities + where.partner(t, Tile::row(i)) * kProbabilityStride;
          const float pair = place.exists ? weight * pairs[t * p.student.views + place.view] : 0.0f;
#pragma unroll
          for (int j = 0; j < Tile::kColumns; ++j) sum[j] += pair * (tile.at(i, j) - row[Tile::column(j)]);
        }
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) out[(Tile::row(i) - part * kScratchRows) * kStride + Tile::column(j)] = Out(sum[j]);
      }
      __syncwarp();
      store_rows(out, p, where, part * kScratchRows);
      __syncwarp();
    }
  }

  // Writes whole rows of the tile, 16 bytes a lane.
  template <class T>
  __device__ void store_rows(const Out* shared, const Problem<T>& p, const TilePosition& where, int first_row) const {
    constexpr int kValues = kUnitBytes / int(sizeof(Out)), kRowUnits = kTileColumns / kValues;
    const bool aligned = p.prototypes % kValues == 0;
    for (int i = threadIdx.x % kWarpLanes; i < kScratchRows * kRowUnits; i += kWarpLanes) {
      const int row = i / kRowUnits, column = i % kRowUnits * kValues, k = where.tile * kTileColumns + column;
      const RowPosition place = where.place(first_row + row);
      if (!place.exists) continue;
      store_unit(gradient + (int64_t(place.view) * p.positions + place.position) * p.prototypes + k,
                 shared + row * kStride + column, p.prototypes - k, aligned);
    }
  }
};

// ------------------------------------------------------------------------------------------------ stream

template <class T>
__device__ TilePosition tile_position(const Problem<T>& p, const Plan& plan) {
  const int warp = int(threadIdx.x) / kWarpLanes, first_tile = int(blockIdx.y) * plan.tiles;
  TilePosition where{plan, warp * kTileRows, 0, p.teacher.views, p.teacher.views, p.positions, first_tile, p.prototypes, p.scales.load()};
  if (warp >= plan.teacher_warps) {
    where.first_slot -= plan.teacher_warps * kTileRows, where.first_view = int(blockIdx.z) * plan.views;
    where.views_here = plan.views, where.views = p.student.views;
  }
  return where;
}

template <class T, class Task>
__global__ void __launch_bounds__(kMaxWarps * kWarpLanes, 1) stream_kernel(Problem<T> p, Plan plan, Task task) {
  const int chunks = p.chunks(), slots = plan.warps() * kTileRows, teacher_slots = plan.teacher_warps * kTileRows;
  char* rows = shared_memory();                                                   // [chunks][slots]
  char* stages = rows + chunks * slots * kChunkBytes;                             // [kStages]
  float* probabilities = reinterpret_cast<float*>(stages + kStages * kStageBytes);  // [teacher slots]
  char* scratch = reinterpret_cast<char*>(probabilities + teacher_slots * kProbabilityStride);

  const int warp = int(threadIdx.x) / kWarpLanes, first_tile = int(blockIdx.y) * plan.tiles;
  const bool is_teacher = warp < plan.teacher_warps;
  const int first_view = int(blockIdx.z) * plan.views;
  const int left = p.tiles() - first_tile, steps = (left < plan.tiles ? left : plan.tiles) * chunks;
  TilePosition where = tile_position(p, plan);

  stage_rows(rows, p.teacher, p, plan, 0, teacher_slots, slots);
  stage_rows(rows + teacher_slots * kChunkBytes, p.student, p, plan, first_view, slots - teacher_slots, slots);
  commit_copies();
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    if (ahead < steps) stage_weights(stages + ahead * kStageBytes, p, first_tile + ahead / chunks, ahead % chunks);
    commit_copies();
  }
  WarpTile<T> tile;
  tile.clear();
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the chunk is complete, and all warps are done with the stage that is filled next
    const int next = step + kStages - 1;
    if (next < steps) stage_weights(stages + next % kStages * kStageBytes, p, first_tile + next / chunks, next % chunks);
    commit_copies();
    const char* stage = stages + step % kStages * kStageBytes + (is_teacher ? 0 : kTileColumns * kChunkBytes);
    tile.multiply(rows + step % chunks * slots * kChunkBytes, warp * kTileRows, stage);
    if (step % chunks != chunks - 1) continue;
    where.tile = first_tile + step / chunks;
    if (is_teacher) task.teacher_tile(tile, p, where, probabilities);
    __syncthreads();  // the probabilities are complete; they stay until the barrier before the next chunk
    if (!is_teacher) task.student_tile(tile, p, where, probabilities, scratch);
    tile.clear();
  }
}

constexpr int kReadRows = 16;  // a warp's rows are read in two halves, which leaves registers for more blocks

// Dot products for some of a warp's rows; those of missing rows and prototypes are 0.
__device__ __forceinline__ void load_tile(WarpTile<float, 1>& tile, const Branch<float>& branch, const TilePosition& where) {
  using Tile = WarpTile<float, 1>;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const RowPosition place = where.place(Tile::row(i));
    const float* row = branch.rows + place.view * branch.view_stride + place.position * branch.row_stride + where.tile * kTileColumns;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j)
      tile.at(i, j) = place.exists && where.has(Tile::column(j)) ? row[Tile::column(j)] : 0.0f;
  }
}

template <class Task>
__global__ void __launch_bounds__(kMaxWarps * kWarpLanes, 2) read_kernel(Problem<float> p, Plan plan, Task task) {
  float* probabilities = reinterpret_cast<float*>(shared_memory());  // [teacher slots]
  char* scratch = reinterpret_cast<char*>(probabilities + plan.teacher_warps * kTileRows * kProbabilityStride);
  const bool is_teacher = int(threadIdx.x) / kWarpLanes < plan.teacher_warps;
  TilePosition where = tile_position(p, plan);
  const int end = min_int(where.tile + plan.tiles, p.tiles()), first_slot = where.first_slot;
  WarpTile<float, 1> tile;
  for (; where.tile < end; ++where.tile) {
    for (int rows = 0; is_teacher && rows < kTileRows; rows += kReadRows) {
      where.first_slot = first_slot + rows;
      load_tile(tile, p.teacher, where);
      task.teacher_tile(tile, p, where, probabilities);
    }
    __syncthreads();
    for (int rows = 0; !is_teacher && rows < kTileRows; rows += kReadRows) {
      where.first_slot = first_slot + rows;
      load_tile(tile, p.student, where);
      task.student_tile(tile, p, where, probabilities, scratch);
    }
    __syncthreads();
  }
}

template <class Task>
size_t task_bytes(const Plan& plan) {
  return size_t(plan.teacher_warps) * kTileRows * kProbabilityStride * sizeof(float) + Task::scratch_bytes(plan.student_warps, 0);
}

// Of shared memory; without channels there are dot products instead of rows and stages.
template <class T, class Task>
size_t shared_bytes(const Problem<T>& p, const Plan& plan) {
  const size_t staged = p.channels ? size_t(p.chunks()) * plan.warps() * kTileRows * kChunkBytes + kStages * kStageBytes : 0;
  return staged + task_bytes<Task>(plan);
}

// As many positions as fit, with all views of the student so that the teacher's products are done once; if 16
// positions of all views do not fit, groups of views, as equal as they can be.
template <class T, class Task>
Plan plan_for(const Problem<T>& p, size_t limit) {
  const auto warps = [](int rows) { return (rows + kTileRows - 1) / kTileRows; };
  const auto of = [&](int log2_positions, int views) {
    return Plan{log2_positions, views, warps(p.teacher.views << log2_positions), warps(views << log2_positions), 0};
  };
  const auto fits = [&](const Plan& plan) { return plan.warps() <= kMaxWarps && shared_bytes<T, Task>(p, plan) <= limit; };
  for (int log2 = 7; log2 >= 4; --log2)
    if ((log2 == 4 || p.positions > 1 << (log2 - 1)) && fits(of(log2, p.student.views))) return of(log2, p.student.views);
  for (int groups = 2; groups <= p.student.views; ++groups) {
    const Plan plan = of(4, (p.student.views + groups - 1) / groups);
    if (fits(plan)) return plan;
  }
  STD_TORCH_CHECK(false, "prototype_ce: ", p.teacher.views, " teacher views of ", p.channels, " channels need ",
                  shared_bytes<T, Task>(p, of(4, 1)), " bytes of shared memory and this GPU has ", limit,
                  "; use force(prototype_ce='triton').");
}

template <class T, class Task>
void launch_task(const OnDevice& device, const Tensor& z, const Problem<T>& p, const Task& task, void (*kernel)(Problem<T>, Plan, Task)) {
  Plan plan = plan_for<T, Task>(p, device.shared_memory_limit());
  const int blocks = (p.positions + plan.positions() - 1) / plan.positions(), groups = (p.student.views + plan.views - 1) / plan.views;
  // Four blocks for every multiprocessor, so that the last ones cost little; tiles are independent.
  const int parts = (4 * multiprocessors(z) + blocks * groups - 1) / (blocks * groups);
  plan.tiles = (p.tiles() + parts - 1) / parts;
  const dim3 grid{unsigned(blocks), unsigned((p.tiles() + plan.tiles - 1) / plan.tiles), unsigned(groups)};
  launch(device, kernel, grid, plan.warps() * kWarpLanes, shared_bytes<T, Task>(p, plan), p, plan, task);
}

// ---------------------------------------------------------------------------------------------- merge

constexpr int kMergeWarps = 32;

// A running sum of powers of two.
struct Powers {
  float highest = -FLT_MAX, sum = 0;
  __device__ void add(float log2_sum) {
    const float higher = fmaxf(highest, log2_sum);
    sum = sum * exp2f(highest - higher) + exp2f(log2_sum - higher);
    highest = higher;
  }
  __device__ float log2_sum() const { return highest + log2f(sum); }
};

// The sum over all warps, each of which has some of the tiles, for every thread's position.
__device__ float merge_powers(const Powers& own, float* shared) {
  const int warps = blockDim.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  shared[threadIdx.x] = own.log2_sum();
  __syncthreads();
  Powers all;
  for (int warp = 0; warp < warps; ++warp) all.add(shared[warp * kWarpLanes + lane]);
  __syncthreads();
  return all.log2_sum();
}

__device__ float merge_sums(float own, float* shared) {
  const int warps = blockDim.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  shared[threadIdx.x] = own;
  __syncthreads();
  float all = 0;
  for (int warp = 0; warp < warps; ++warp) all += shared[warp * kWarpLanes + lane];
  __syncthreads();
  return all;
}

struct MergeArguments {
  int students, teachers, positions, tiles;
  const float *pairs, *weights;
  float *log2_student, *log2_teacher;  // [S, R], [T, R]
  float* losses;                       // [S, blocks of 32 positions]
};

// One view of the student, 32 positions: a lane each, and the tiles spread over the warps.
__global__ void __launch_bounds__(kMergeWarps * kWarpLanes) merge_kernel(Statistics parts, MergeArguments c) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int s = blockIdx.y, r = int(blockIdx.x) * kWarpLanes + lane, at = r < c.positions ? r : c.positions - 1;
  const int64_t positions = c.positions;
  Powers powers;
  for (int tile = warp; tile < c.tiles; tile += warps) powers.add(parts.student[(int64_t(tile) * c.students + s) * positions + at]);
  const float student = merge_powers(powers, shared);
  float loss = 0;
  for (int t = 0; t < c.teachers; ++t) {
    powers = Powers{};
    for (int tile = warp; tile < c.tiles; tile += warps) powers.add(parts.teacher[(int64_t(tile) * c.teachers + t) * positions + at]);
    const float teacher = merge_powers(powers, shared);
    float expected = 0;
    for (int tile = warp; tile < c.tiles; tile += warps) {
      const int64_t of_teacher = int64_t(tile) * c.teachers + t;
      expected += exp2f(parts.teacher[of_teacher * positions + at] - teacher) * parts.expected[(of_teacher * c.students + s) * positions + at];
    }
    loss += c.pairs[t * c.students + s] * (student - merge_sums(expected, shared));
    if (warp == 0 && s == 0 && r < c.positions) c.log2_teacher[t * positions + r] = teacher;
  }
  if (warp > 0) return;
  if (r < c.positions) c.log2_student[s * positions + r] = student;
  loss = r < c.positions ? loss * c.weights[r] * kLn2 : 0.0f;
  for (int step = 1; step < kWarpLanes; step *= 2) loss += __shfl_xor_sync(kAllLanes, loss, step);
  if (lane == 0) c.losses[s * gridDim.x + blockIdx.x] = loss;
}

__global__ void __launch_bounds__(kMergeWarps * kWarpLanes) total_kernel(const float* values, int count, float* total) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  sum = merge_sums(sum, shared);
  for (int step = 1; step < kWarpLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x == 0) *total = sum;
}

// ------------------------------------------------------------------------------------------------ whole rows

constexpr int kWholeThreads = 512;

struct WholeArguments {
  const float *student, *teacher;  // [S, R, K], [T, R, K] dot products
  const float* bias;               // [K] or null
  ScaleSource scales;
  const float *pairs, *weights, *unit;           // [T, S], [R], scalar
  float *losses, *log2_student, *log2_teacher;  // [S, all], [S, all], [T, all], of which these rows begin at `first`
  int students, teachers, positions, prototypes, first, all;
};

// The sum or the maximum over the block of every thread's value, in a fixed order.
template <bool SUM>
__device__ float over_block(float value, float* shared) {
  const auto join = [](float a, float b) { return SUM ? a + b : fmaxf(a, b); };
  for (int step = 1; step < kWarpLanes; step *= 2) value = join(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % kWarpLanes == 0) shared[threadIdx.x / kWarpLanes] = value;
  __syncthreads();
  float all = shared[0];
  for (int warp = 1; warp < int(blockDim.x) / kWarpLanes; ++warp) all = join(all, shared[warp]);
  __syncthreads();
  return all;
}

template <class T, int N>
struct alignas(N * sizeof(T)) Values {
  T at[N];
};

// N prototypes at a time, by which their number can be divided.
template <class Out, int N>
__global__ void __launch_bounds__(kWholeThreads, 2) whole_kernel(WholeArguments a, Out* gradient) {
  float* reduced = reinterpret_cast<float*>(shared_memory());  // [warps]
  float* inverses = reduced + kWarpLanes;                      // [T] 1 / sum of powers
  float* row = inverses + (a.teachers + 3) / 4 * 4;            // [K] the student's logits
  float* powers = row + a.prototypes;                          // [T, K] the teachers'
  using Some = Values<float, N>;
  const int begin_k = N * int(threadIdx.x), step_k = N * int(blockDim.x);
  const Scales scales = a.scales.load();
  const int64_t r = blockIdx.x, K = a.prototypes;
  for (int t = 0; t < a.teachers; ++t) {
    const float* dots = a.teacher + (t * int64_t(a.positions) + r) * K;
    float* own = powers + t * K;
    float highest = -FLT_MAX, sum = 0;
    for (int k = begin_k; k < a.prototypes; k += step_k) {
      Some x = *reinterpret_cast<const Some*>(dots + k);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x.at[i] = x.at[i] * scales.teacher + (a.bias ? a.bias[k + i] * scales.bias : 0.0f);
        highest = fmaxf(highest, x.at[i]);
      }
      *reinterpret_cast<Some*>(own + k) = x;
    }
    highest = over_block<false>(highest, reduced);
    for (int k = begin_k; k < a.prototypes; k += step_k) {
      Some x = *reinterpret_cast<const Some*>(own + k);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += x.at[i] = exp2f(x.at[i] - highest);
      *reinterpret_cast<Some*>(own + k) = x;
    }
    sum = over_block<true>(sum, reduced);
    if (threadIdx.x == 0) {
      a.log2_teacher[t * int64_t(a.all) + a.first + r] = highest + log2f(sum);
      inverses[t] = 1 / sum;
    }
  }
  __syncthreads();
  const float weight = a.weights[r];
  for (int s = 0; s < a.students; ++s) {
    const int64_t begin = (s * int64_t(a.positions) + r) * K;
    float highest = -FLT_MAX, sum = 0, loss = 0;
    for (int k = begin_k; k < a.prototypes; k += step_k) {
      Some x = *reinterpret_cast<const Some*>(a.student + begin + k);
#pragma unroll
      for (int i = 0; i < N; ++i) highest = fmaxf(highest, x.at[i] *= scales.student);
      *reinterpret_cast<Some*>(row + k) = x;
    }
    highest = over_block<false>(highest, reduced);
    for (int k = begin_k; k < a.prototypes; k += step_k) {
      const Some x = *reinterpret_cast<const Some*>(row + k);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += exp2f(x.at[i] - highest);
      for (int t = 0; t < a.teachers; ++t) {
        const float pair = a.pairs[t * a.students + s] * inverses[t];
        const Some q = *reinterpret_cast<const Some*>(powers + t * K + k);
#pragma unroll
        for (int i = 0; i < N; ++i) loss -= pair * q.at[i] * x.at[i];
      }
    }
    const float log2_sum = highest + log2f(over_block<true>(sum, reduced));
    loss = over_block<true>(loss, reduced);
    float pairs = 0;
    for (int t = 0; t < a.teachers; ++t) pairs += a.pairs[t * a.students + s];
    if (threadIdx.x == 0) {
      a.losses[s * int64_t(a.all) + a.first + r] = (loss + pairs * log2_sum) * weight * kLn2;
      a.log2_student[s * int64_t(a.all) + a.first + r] = log2_sum;
    }
    if (!gradient) continue;
    const float stored = weight * *a.unit;
    for (int k = begin_k; k < a.prototypes; k += step_k) {
      Some p = *reinterpret_cast<const Some*>(row + k), g = {};
#pragma unroll
      for (int i = 0; i < N; ++i) p.at[i] = exp2f(p.at[i] - log2_sum);
      for (int t = 0; t < a.teachers; ++t) {
        const float pair = a.pairs[t * a.students + s], inverse = inverses[t];
        const Some q = *reinterpret_cast<const Some*>(powers + t * K + k);
#pragma unroll
        for (int i = 0; i < N; ++i) g.at[i] += pair * (p.at[i] - q.at[i] * inverse);
      }
      Values<Out, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.at[i] = Out(g.at[i] * stored);
      *reinterpret_cast<Values<Out, N>*>(gradient + begin + k) = out;
    }
  }
}

// ------------------------------------------------------------------------------------------------ launch

template <class T>
Branch<T> branch_of(const Tensor& z, const std::optional<Tensor>& weights) {
  const T *z_ptr = static_cast<const T*>(z.data_ptr()), *weights_ptr = weights ? static_cast<const T*>(weights->data_ptr()) : nullptr;
  STD_TORCH_CHECK(z.size(2) <= 1 || (z.stride(2) == 1 && (!weights || weights->stride(1) == 1)),
                  "prototype_ce: rows must have dense channels, got strided ones; call the Python function.");
  const int64_t weight_stride = weights ? weights->stride(0) : 0;
  return {z_ptr,
          weights_ptr,
          z.stride(0),
          z.stride(1),
          weight_stride,
          rows_aligned(z_ptr, {z.stride(0), z.stride(1)}),
          rows_aligned(weights_ptr, {weight_stride}),
          int(z.size(0))};
}

float* pointer(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }
const float* pointer(const std::optional<Tensor>& tensor) { return tensor ? pointer(*tensor) : nullptr; }

ScaleSource scales_of(double temperature, double teacher_temperature, const std::optional<Tensor>& divisor,
                      const std::optional<Tensor>& units) {
  return {float(kLog2e / temperature), float(kLog2e / teacher_temperature),
          divisor ? static_cast<const double*>(divisor->data_ptr()) : nullptr, pointer(units)};
}

template <class T>
Problem<T> problem_of(const Tensor& z, const std::optional<Tensor>& prototypes, const Tensor& teacher_z,
                      const std::optional<Tensor>& teacher_prototypes, const ScaleSource& scales, const std::optional<Tensor>& bias) {
  return {branch_of<T>(z, prototypes), branch_of<T>(teacher_z, teacher_prototypes), scales, pointer(bias), int(z.size(1)),
          prototypes ? int(z.size(2)) : 0, int(prototypes ? prototypes->size(0) : z.size(2))};
}

// Without prototypes, `z` and `teacher_z` are dot products [views, positions, prototypes] in fp32.
std::tuple<Tensor, Tensor, Tensor> prototype_ce_tiles(
    const Tensor& z, const std::optional<Tensor>& prototypes, const Tensor& teacher_z, const std::optional<Tensor>& teacher_prototypes,
    double temperature, double teacher_temperature, const std::optional<Tensor>& divisor, const std::optional<Tensor>& units,
    const std::optional<Tensor>& bias) {
  const OnDevice device(z);
  const auto allocate = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(z, sizes, ScalarType::Float); };
  const int64_t students = z.size(0), teachers = teacher_z.size(0), positions = z.size(1);
  const int64_t tiles = ((prototypes ? prototypes->size(0) : z.size(2)) + kTileColumns - 1) / kTileColumns;
  Tensor student = allocate({tiles, students, positions}), teacher = allocate({tiles, teachers, positions});
  Tensor expected = allocate({tiles, teachers, students, positions});
  const Statistics statistics{pointer(student), pointer(teacher), pointer(expected)};
  const ScaleSource scales = scales_of(temperature, teacher_temperature, divisor, units);
  with_float_type(z, "prototype_ce", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto p = problem_of<T>(z, prototypes, teacher_z, teacher_prototypes, scales, bias);
    if constexpr (std::is_same_v<T, float>)
      if (!prototypes) return launch_task(device, z, p, statistics, read_kernel<Statistics>);
    launch_task(device, z, p, statistics, stream_kernel<T, Statistics>);
  });
  return {student, teacher, expected};
}

// The loss, and log2 of both branches' sums.
std::tuple<Tensor, Tensor, Tensor> prototype_ce_merge(const Tensor& student, const Tensor& teacher, const Tensor& expected,
                                                      const Tensor& pair_weight, const Tensor& row_weight) {
  const OnDevice device(student);
  const auto allocate = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(student, sizes, ScalarType::Float); };
  const int64_t tiles = student.size(0), students = student.size(1), teachers = teacher.size(1), positions = student.size(2);
  const int64_t blocks = (positions + kWarpLanes - 1) / kWarpLanes;
  Tensor loss = allocate({}), log2_student = allocate({students, positions}), log2_teacher = allocate({teachers, positions});
  Tensor losses = allocate({students, blocks});
  const Statistics statistics{pointer(student), pointer(teacher), pointer(expected)};
  const MergeArguments merge_arguments{int(students), int(teachers), int(positions), int(tiles), pointer(pair_weight), pointer(row_weight),
                              pointer(log2_student), pointer(log2_teacher), pointer(losses)};
  const int threads = int(tiles < kMergeWarps ? tiles : kMergeWarps) * kWarpLanes;
  launch(device, merge_kernel, dim3{unsigned(blocks), unsigned(students), 1}, threads, threads * sizeof(float), statistics, merge_arguments);
  const int count = int(students * blocks), adders = count < kMergeWarps * kWarpLanes ? kWarpLanes : kMergeWarps * kWarpLanes;
  launch(device, total_kernel, dim3{1, 1, 1}, adders, adders * sizeof(float), static_cast<const float*>(pointer(losses)), count,
         pointer(loss));
  return {loss, log2_student, log2_teacher};
}

// Calls f(Type<Out>{}) with the type of gradients: fp32, or fp16.
template <class F>
void with_gradient_type(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) return f(Type<float>{});
  STD_TORCH_CHECK(dtype == ScalarType::Half,
                  "prototype_ce: gradients of fp32 logits must be float16 or float32, got another; call the Python function.");
  return f(Type<Half>{});
}

// The gradient of the student's logits, [S, R, K].
Tensor prototype_ce_grad_logits(
    const Tensor& z, const std::optional<Tensor>& prototypes, const Tensor& teacher_z, const std::optional<Tensor>& teacher_prototypes,
    double temperature, double teacher_temperature, const std::optional<Tensor>& divisor, const std::optional<Tensor>& units,
    const std::optional<Tensor>& bias, const Tensor& pair_weight, const Tensor& row_weight, const Tensor& log2_student,
    const Tensor& log2_teacher, const Tensor& unit, ScalarType dtype) {
  const OnDevice device(z);
  const int64_t count = prototypes ? prototypes->size(0) : z.size(2);
  Tensor gradient = torch::stable::new_empty(z, {z.size(0), z.size(1), count}, dtype);
  const ScaleSource scales = scales_of(temperature, teacher_temperature, divisor, units);
  with_float_type(z, "prototype_ce", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto p = problem_of<T>(z, prototypes, teacher_z, teacher_prototypes, scales, bias);
    const auto task = [&](auto out) {
      using Out = typename decltype(out)::type;
      return LogitGradients<Out>{pointer(log2_student), pointer(log2_teacher), pointer(pair_weight),
                                 pointer(row_weight),   pointer(unit),         static_cast<Out*>(gradient.data_ptr())};
    };
    if constexpr (std::is_same_v<T, float>)
      if (!prototypes) return with_gradient_type(dtype, [&](auto out) { launch_task(device, z, p, task(out), read_kernel<decltype(task(out))>); });
    if constexpr (std::is_same_v<T, Half>)
      if (dtype == ScalarType::Float) return launch_task(device, z, p, task(Type<float>{}), stream_kernel<T, LogitGradients<float>>);
    STD_TORCH_CHECK(dtype == z.scalar_type(), "prototype_ce: gradients must have the dtype of z, got another; call the Python function.");
    launch_task(device, z, p, task(type), stream_kernel<T, LogitGradients<T>>);
  });
  return gradient;
}

// From dot products with all prototypes. Writes rows of losses, log2_student and log2_teacher, and the gradient if there is one.
void prototype_ce_whole_rows(const Tensor& dots, const Tensor& teacher_dots, double temperature, double teacher_temperature,
                             const std::optional<Tensor>& divisor, const std::optional<Tensor>& units, const std::optional<Tensor>& bias,
                             const Tensor& pair_weight, const Tensor& row_weight, const Tensor& unit, int64_t first,
                             const Tensor& losses, const Tensor& log2_student, const Tensor& log2_teacher,
                             const std::optional<Tensor>& gradient) {
  const OnDevice device(dots);
  const int teachers = int(teacher_dots.size(0)), prototypes = int(dots.size(2));
  const WholeArguments arguments{pointer(dots), pointer(teacher_dots), pointer(bias), scales_of(temperature, teacher_temperature, divisor, units),
                                 pointer(pair_weight), pointer(row_weight), pointer(unit), pointer(losses), pointer(log2_student),
                                 pointer(log2_teacher), int(dots.size(0)), teachers, int(dots.size(1)), prototypes, int(first),
                                 int(losses.size(1))};
  const size_t bytes = (kWarpLanes + size_t(teachers + 3) / 4 * 4 + size_t(teachers + 1) * prototypes) * sizeof(float);
  const int enough = (prototypes + 4 * kWarpLanes - 1) / (4 * kWarpLanes) * kWarpLanes, threads = enough < kWholeThreads ? enough : kWholeThreads;
  with_gradient_type(gradient ? gradient->scalar_type() : ScalarType::Float, [&](auto out) {
    using Out = typename decltype(out)::type;
    Out* values = gradient ? static_cast<Out*>(gradient->data_ptr()) : nullptr;
    const dim3 grid{unsigned(dots.size(1)), 1, 1};
    if (prototypes % 4 == 0)
      launch(device, whole_kernel<Out, 4>, grid, threads, bytes, arguments, values);
    else
      launch(device, whole_kernel<Out, 1>, grid, threads, bytes, arguments, values);
  });
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) {
  m.impl("prototype_ce_tiles", TORCH_BOX(&patchlight::prototype_ce_tiles));
  m.impl("prototype_ce_merge", TORCH_BOX(&patchlight::prototype_ce_merge));
  m.impl("prototype_ce_grad_logits", TORCH_BOX(&patchlight::prototype_ce_grad_logits));
  m.impl("prototype_ce_whole_rows", TORCH_BOX(&patchlight::prototype_ce_whole_rows));
}
