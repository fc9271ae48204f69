// prototype_ce on the GPU.
//   stream    a block keeps the rows of some positions, of all views, in shared memory; tiles of 64 prototypes of both branches
//             are loaded in 128-byte chunks through asynchronous stages. A warp owns 32 rows. Teacher warps write their
//             probabilities to shared memory; student warps then read those of their own positions. The rest is a task:
//     Statistics      a tile's sums and the student's mean logit under each teacher, final for that tile
//     LogitGradients  the gradient of the student's logits, from the sums of all tiles
//   merge     combines the Statistics of all tiles to the loss of 32 positions of one view
//   total     sums those losses
// Logits are in units of log2 and never leave the registers; all sums are fp32 and in a fixed order.
#include <cfloat>
#include <optional>

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
  float scale;  // 1 / (temperature ln 2)
};

template <class T>
struct Problem {
  Branch<T> student, teacher;
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
  const float bias = p.bias && where.has(column) ? p.bias[k] : 0.0f;
  return where.has(column) ? (dot + bias) * p.teacher.scale : -INFINITY;
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

  template <class T>
  __device__ void teacher_tile(WarpTile<T>& tile, const Problem<T>& p, const TilePosition& where, float* probabilities) const {
    using Tile = WarpTile<T>;
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

  template <class T>
  __device__ void student_tile(WarpTile<T>& tile, const Problem<T>& p, const TilePosition& where, const float* probabilities, char*) const {
    using Tile = WarpTile<T>;
    const bool writes = threadIdx.x % Tile::kSharers == 0;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const RowPosition place = where.place(Tile::row(i));
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) tile.at(i, j) *= p.student.scale;
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

template <class T>
struct LogitGradients {
  const float* student;  // [S, R] log2 of the sum of powers
  const float* teacher;  // [T, R]
  const float* pairs;    // [T, S]
  const float* weights;  // [R]
  const float* unit;     // a gradient of 1 is stored as this
  T* gradient;           // [S, R, K]

  static constexpr int kStride = kTileColumns + kUnitBytes / int(sizeof(T));  // of the scratch
  static size_t scratch_bytes(int warps, size_t) { return size_t(warps) * kScratchRows * kStride * sizeof(T); }

  __device__ void teacher_tile(WarpTile<T>& tile, const Problem<T>& p, const TilePosition& where, float* probabilities) const {
    using Tile = WarpTile<T>;
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

  __device__ void student_tile(WarpTile<T>& tile, const Problem<T>& p, const TilePosition& where, const float* probabilities,
                        char* scratch) const {
    using Tile = WarpTile<T>;
    T* out = reinterpret_cast<T*>(scratch) + where.first_slot / kTileRows * kScratchRows * kStride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = half * Tile::kRows / 2; i < (half + 1) * Tile::kRows / 2; ++i) {
        const RowPosition place = where.place(Tile::row(i));
        const float log2_sum = place.exists ? student[int64_t(place.view) * p.positions + place.position] : 0.0f;
        const float weight = place.exists ? weights[place.position] * *unit : 0.0f;
        float sum[Tile::kColumns] = {};
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) tile.at(i, j) = exp2f(tile.at(i, j) * p.student.scale - log2_sum);
        for (int t = 0; t < p.teacher.views; ++t) {
          const float* row = probabilities + where.partner(t, Tile::row(i)) * kProbabilityStride;
          const float pair = place.exists ? weight * pairs[t * p.student.views + place.view] : 0.0f;
#pragma unroll
          for (int j = 0; j < Tile::kColumns; ++j) sum[j] += pair * (tile.at(i, j) - row[Tile::column(j)]);
        }
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) out[(Tile::row(i) - half * kScratchRows) * kStride + Tile::column(j)] = T(sum[j]);
      }
      __syncwarp();
      store_rows(out, p, where, half * kScratchRows);
      __syncwarp();
    }
  }

  // Writes whole rows of the tile, 16 bytes a lane.
  __device__ void store_rows(const T* shared, const Problem<T>& p, const TilePosition& where, int first_row) const {
    constexpr int kValues = kUnitBytes / int(sizeof(T)), kRowUnits = kTileColumns / kValues;
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
  TilePosition where{plan, warp * kTileRows, 0, p.teacher.views, p.teacher.views, p.positions, first_tile, p.prototypes};
  if (!is_teacher) {
    where.first_slot -= teacher_slots, where.first_view = first_view;
    where.views_here = plan.views, where.views = p.student.views;
  }

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

template <class T, class Task>
size_t shared_bytes(const Problem<T>& p, const Plan& plan) {
  return size_t(p.chunks()) * plan.warps() * kTileRows * kChunkBytes + kStages * kStageBytes +
         size_t(plan.teacher_warps) * kTileRows * kProbabilityStride * sizeof(float) + Task::scratch_bytes(plan.student_warps, 0);
}

// As many positions as fit, with all views of the student so that the teacher's products are done once; if 16
// positions of all views do not fit, as many views as fit.
template <class T, class Task>
Plan plan_for(const Problem<T>& p, size_t limit) {
  const auto warps = [](int rows) { return (rows + kTileRows - 1) / kTileRows; };
  const auto of = [&](int log2_positions, int views) {
    return Plan{log2_positions, views, warps(p.teacher.views << log2_positions), warps(views << log2_positions), 0};
  };
  const auto fits = [&](const Plan& plan) { return plan.warps() <= kMaxWarps && shared_bytes<T, Task>(p, plan) <= limit; };
  for (int log2 = 7; log2 >= 4; --log2)
    if ((log2 == 4 || p.positions > 1 << (log2 - 1)) && fits(of(log2, p.student.views))) return of(log2, p.student.views);
  for (int views = p.student.views - 1; views >= 1; --views)
    if (fits(of(4, views))) return of(4, views);
  STD_TORCH_CHECK(false, "prototype_ce: ", p.teacher.views, " teacher views of ", p.channels, " channels need ",
                  shared_bytes<T, Task>(p, of(4, 1)), " bytes of shared memory and this GPU has ", limit,
                  "; use force(prototype_ce='triton').");
}

template <class T, class Task>
void launch_stream(const OnDevice& device, const Tensor& z, const Problem<T>& p, const Task& task) {
  Plan plan = plan_for<T, Task>(p, device.shared_memory_limit());
  const int blocks = (p.positions + plan.positions() - 1) / plan.positions(), groups = (p.student.views + plan.views - 1) / plan.views;
  // Four blocks for every multiprocessor, so that the last ones cost little; tiles are independent.
  const int parts = (4 * multiprocessors(z) + blocks * groups - 1) / (blocks * groups);
  plan.tiles = (p.tiles() + parts - 1) / parts;
  const dim3 grid{unsigned(blocks), unsigned((p.tiles() + plan.tiles - 1) / plan.tiles), unsigned(groups)};
  launch(device, stream_kernel<T, Task>, grid, plan.warps() * kWarpLanes, shared_bytes<T, Task>(p, plan), p, plan, task);
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

// ------------------------------------------------------------------------------------------------ launch

template <class T>
Branch<T> branch_of(const Tensor& z, const Tensor& weights, double temperature) {
  const T *z_ptr = static_cast<const T*>(z.data_ptr()), *weights_ptr = static_cast<const T*>(weights.data_ptr());
  STD_TORCH_CHECK(z.size(2) <= 1 || (z.stride(2) == 1 && weights.stride(1) == 1),
                  "prototype_ce: rows must have dense channels, got strided ones; call the Python function.");
  return {z_ptr,
          weights_ptr,
          z.stride(0),
          z.stride(1),
          weights.stride(0),
          rows_aligned(z_ptr, {z.stride(0), z.stride(1)}),
          rows_aligned(weights_ptr, {weights.stride(0)}),
          int(z.size(0)),
          float(kLog2e / temperature)};
}

float* pointer(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

template <class T>
Problem<T> problem_of(const Tensor& z, const Tensor& prototypes, const Tensor& teacher_z, const Tensor& teacher_prototypes,
                      double temperature, double teacher_temperature, const std::optional<Tensor>& bias) {
  return {branch_of<T>(z, prototypes, temperature), branch_of<T>(teacher_z, teacher_prototypes, teacher_temperature),
          bias ? pointer(*bias) : nullptr, int(z.size(1)), int(z.size(2)), int(prototypes.size(0))};
}

// The last two results are empty: on a GPU the backward makes the gradients, from the sums in the second and third.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prototype_ce_fwd(
    const Tensor& z, const Tensor& prototypes, const Tensor& teacher_z, const Tensor& teacher_prototypes, double temperature,
    double teacher_temperature, const Tensor& pair_weight, const Tensor& row_weight, const std::optional<Tensor>& bias,
    bool gradients) {
  STD_TORCH_CHECK(!gradients, "prototype_ce: gradients must be false in CUDA, got true; call the Python function.");
  const OnDevice device(z);
  const auto allocate = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(z, sizes, ScalarType::Float); };
  const int64_t students = z.size(0), teachers = teacher_z.size(0), positions = z.size(1);
  const int64_t tiles = (prototypes.size(0) + kTileColumns - 1) / kTileColumns, blocks = (positions + kWarpLanes - 1) / kWarpLanes;
  Tensor loss = allocate({}), log2_student = allocate({students, positions}), log2_teacher = allocate({teachers, positions});
  Tensor student = allocate({tiles, students, positions}), teacher = allocate({tiles, teachers, positions});
  Tensor expected = allocate({tiles, teachers, students, positions}), losses = allocate({students, blocks});
  const Statistics statistics{pointer(student), pointer(teacher), pointer(expected)};
  with_float_type(z, "prototype_ce", [&](auto type) {
    using T = typename decltype(type)::type;
    launch_stream<T>(device, z,
                     problem_of<T>(z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, bias), statistics);
  });
  const MergeArguments merge_arguments{int(students), int(teachers), int(positions), int(tiles), pointer(pair_weight), pointer(row_weight),
                              pointer(log2_student), pointer(log2_teacher), pointer(losses)};
  const int threads = int(tiles < kMergeWarps ? tiles : kMergeWarps) * kWarpLanes;
  launch(device, merge_kernel, dim3{unsigned(blocks), unsigned(students), 1}, threads, threads * sizeof(float), statistics, merge_arguments);
  const int count = int(students * blocks), adders = count < kMergeWarps * kWarpLanes ? kWarpLanes : kMergeWarps * kWarpLanes;
  launch(device, total_kernel, dim3{1, 1, 1}, adders, adders * sizeof(float), static_cast<const float*>(pointer(losses)), count,
         pointer(loss));
  return {loss, log2_student, log2_teacher, allocate({0}), allocate({0})};
}

// The gradient of the student's logits, [S, R, K] in the dtype of z.
Tensor prototype_ce_bwd(const Tensor& z, const Tensor& prototypes, const Tensor& teacher_z, const Tensor& teacher_prototypes,
                        double temperature, double teacher_temperature, const Tensor& pair_weight, const Tensor& row_weight,
                        const std::optional<Tensor>& bias, const Tensor& log2_student, const Tensor& log2_teacher,
                        const Tensor& unit) {
  const OnDevice device(z);
  Tensor gradient = torch::stable::new_empty(z, {z.size(0), z.size(1), prototypes.size(0)});
  with_float_type(z, "prototype_ce", [&](auto type) {
    using T = typename decltype(type)::type;
    const LogitGradients<T> logit_gradients{pointer(log2_student), pointer(log2_teacher), pointer(pair_weight), pointer(row_weight), pointer(unit),
                         static_cast<T*>(gradient.data_ptr())};
    launch_stream<T>(device, z,
                     problem_of<T>(z, prototypes, teacher_z, teacher_prototypes, temperature, teacher_temperature, bias), logit_gradients);
  });
  return gradient;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) {
  m.impl("prototype_ce_fwd", TORCH_BOX(&patchlight::prototype_ce_fwd));
  m.impl("prototype_ce_bwd", TORCH_BOX(&patchlight::prototype_ce_bwd));
}
