// self_relation on the GPU. A block keeps some rows of one view, image and head in shared memory, the student's and the
// teacher's; all rows are loaded in 128-byte chunks, 64 rows at a time, through asynchronous stages. Relations stay in registers.
//   statistics  running softmax sums of the block's rows, of both sides, and their cross-entropy
//   gradient    relations again, D + D^T from the sums of both rows, and at once its product with the loaded features
// Relations are in units of log2; all sums are fp32 and in a fixed order.
#include <algorithm>
#include <cfloat>

#include "../device.h"
#include "../warp_tile.h"

namespace patchlight {
namespace {

constexpr int kStages = 3;
constexpr int kWarpRows = 16;  // half of what fits a warp, so that more warps hide the waiting of one
constexpr int kMaxWarps = 12;  // leaves 168 registers a thread
constexpr int kWideWarps = 8;  // leaves 255
constexpr int kStageBytes = kTileColumns * kChunkBytes;
constexpr float kUnit = 16384;  // times D + D^T, which is in [-2, 2]: makes use of the whole range of fp16

template <class T>
using Tile = WarpTile<T, 1>;  // a warp's 16 rows against 64

template <class T>
struct Side {
  const T* data;  // [views, images, heads, rows, channels]
  int64_t view_stride, image_stride, head_stride, row_stride;
  int channels;
  bool aligned;
  float scale;  // in units of log2
  __host__ __device__ int chunks() const { return (channels + kChunkChannels<T> - 1) / kChunkChannels<T>; }
};

template <class T>
struct Problem {
  Side<T> student, teacher;
  const float* weight;  // [views, images]
  int views, images, heads, rows;
  __host__ __device__ int tiles() const { return (rows + kTileColumns - 1) / kTileColumns; }
  __host__ __device__ int64_t samples() const { return int64_t(views) * images * heads; }
};

struct BlockSample {
  int view, image, head;
  template <class T>
  __device__ explicit BlockSample(const Problem<T>& p)
      : view(int(blockIdx.x / (unsigned(p.images) * unsigned(p.heads)))), image(int(blockIdx.x / unsigned(p.heads) % unsigned(p.images))),
        head(int(blockIdx.x % unsigned(p.heads))) {}
  template <class T>
  __device__ const T* in(const Side<T>& side) const {
    return side.data + view * side.view_stride + image * side.image_stride + head * side.head_stride;
  }
  template <class T>
  __device__ int64_t teacher_row(const Problem<T>& p) const { return (int64_t(image) * p.heads + head) * p.rows; }
};

// Copies one chunk of `count` rows from row `first` on. Missing rows repeat the last one.
template <class T>
__device__ void stage_chunk(char* out, const T* data, const Side<T>& side, int first, int count, int rows, int chunk) {
  for (int i = threadIdx.x; i < count * kUnits; i += blockDim.x) {
    const int unit = i % kUnits, slot = i / kUnits, row = min_int(first + slot, rows - 1);
    stage_unit(out + chunk_offset(slot, unit), data + row * side.row_stride,
               chunk * kChunkChannels<T> + unit * kUnitBytes / int(sizeof(T)), side.channels, side.aligned);
  }
}

// The chunks that are loaded: of each 64 rows the teacher's, the student's, and `again` of those from chunk `first_again` on.
template <class T>
class Stream {
 public:
  __device__ Stream(const Problem<T>& problem, const BlockSample& where, char* shared, int again_from, int again_count)
      : p(problem), student(where.in(problem.student)), teacher(where.in(problem.teacher)), stages(shared), first_again(again_from),
        again(again_count) {
    steps = p.tiles() * in_tile();
    for (int ahead = 0; ahead < kStages - 1; ++ahead) stage(ahead);
  }

  // The next chunk. When it is called, all warps must be done with the chunk before the last.
  __device__ const char* next() {
    wait_copies<kStages - 2>();
    __syncthreads();  // the chunk is complete, and all warps are done with the stage that is filled next
    stage(step + kStages - 1);
    return stages + step++ % kStages * kStageBytes;
  }

 private:
  __device__ int in_tile() const { return p.teacher.chunks() + p.student.chunks() + again; }

  __device__ void stage(int at) {
    if (at < steps) {
      const int tile = at / in_tile(), k = at % in_tile(), of_student = k - p.teacher.chunks();
      char* out = stages + at % kStages * kStageBytes;
      if (of_student < 0)
        stage_chunk(out, teacher, p.teacher, tile * kTileColumns, kTileColumns, p.rows, k);
      else
        stage_chunk(out, student, p.student, tile * kTileColumns, kTileColumns, p.rows,
                    of_student < p.student.chunks() ? of_student : first_again + of_student - p.student.chunks());
    }
    commit_copies();
  }

  const Problem<T>& p;
  const T *student, *teacher;
  char* stages;
  int first_again, again, steps, step = 0;
};

// The block's own rows: the teacher's chunks and the student's, [chunks][slots] each.
template <class T>
struct OwnRows {
  char* shared;
  int slots, first_row;
  __device__ OwnRows(char* out, const Problem<T>& p, const BlockSample& where, int rows_of_block)
      : shared(out), slots(rows_of_block), first_row(int(blockIdx.y) * rows_of_block) {
    for (int c = 0; c < p.teacher.chunks(); ++c) stage_chunk(chunk(c), where.in(p.teacher), p.teacher, first_row, slots, p.rows, c);
    for (int c = 0; c < p.student.chunks(); ++c)
      stage_chunk(chunk(p.teacher.chunks() + c), where.in(p.student), p.student, first_row, slots, p.rows, c);
    commit_copies();
  }
  __device__ char* chunk(int c) const { return shared + c * slots * kChunkBytes; }
};

template <class T>
size_t own_bytes(const Problem<T>& p, int slots) {
  return size_t(p.teacher.chunks() + p.student.chunks()) * slots * kChunkBytes;
}

// A tile's relations: chunks from `first` on of the block's own rows times the next chunks that are loaded.
template <class T>
__device__ __forceinline__ void compute_relations(Tile<T>& tile, const OwnRows<T>& own, Stream<T>& stream, int first, int chunks, float scale) {
  tile.clear();
  for (int c = 0; c < chunks; ++c) tile.multiply(own.chunk(first + c), int(threadIdx.x) / kWarpLanes * kWarpRows, stream.next());
#pragma unroll
  for (int i = 0; i < Tile<T>::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile<T>::kColumns; ++j) tile.at(i, j) *= scale;
}

// ------------------------------------------------------------------------------------------------- statistics

struct StatisticsOutputs {
  float* log2_student;  // [views, images, heads, rows]
  float* log2_teacher;  // [images, heads, rows]
  float* losses;        // [samples, blocks]
};

// Updates the running maximum of a row of the tile; returns the factor from older sums of powers to the new maximum.
template <class Tile>
__device__ __forceinline__ float update_maximum(Tile& tile, int i, float& highest, int left) {
  float top = highest;
#pragma unroll
  for (int j = 0; j < Tile::kColumns; ++j) top = fmaxf(top, Tile::column(j) < left ? tile.at(i, j) : -FLT_MAX);
  top = row_max<Tile>(top);
  const float rescale = exp2f(highest - top);
  highest = top;
  return rescale;
}

template <class T>
__global__ void __launch_bounds__(kMaxWarps * kWarpLanes, 1) statistics_kernel(Problem<T> p, int rows_of_block, StatisticsOutputs out) {
  using Tile = Tile<T>;
  const BlockSample where(p);
  const OwnRows<T> own(shared_memory(), p, where, rows_of_block);
  char* stages = shared_memory() + (p.teacher.chunks() + p.student.chunks()) * rows_of_block * kChunkBytes;
  Stream<T> stream(p, where, stages, 0, 0);
  const int warp = int(threadIdx.x) / kWarpLanes, first_row = own.first_row + warp * kWarpRows;
  float highest[Tile::kRows], sum[Tile::kRows], teacher_highest[Tile::kRows], teacher_sum[Tile::kRows], expected[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    highest[i] = teacher_highest[i] = -FLT_MAX;
    sum[i] = teacher_sum[i] = expected[i] = 0;
  }
  for (int t = 0; t < p.tiles(); ++t) {
    const int left = p.rows - t * kTileColumns;
    Tile powers, tile;
    compute_relations(powers, own, stream, 0, p.teacher.chunks(), p.teacher.scale);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const float rescale = update_maximum(powers, i, teacher_highest[i], left);
      teacher_sum[i] *= rescale, expected[i] *= rescale;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        powers.at(i, j) = Tile::column(j) < left ? exp2f(powers.at(i, j) - teacher_highest[i]) : 0.0f;
        teacher_sum[i] += powers.at(i, j);
      }
    }
    compute_relations(tile, own, stream, p.teacher.chunks(), p.student.chunks(), p.student.scale);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      sum[i] *= update_maximum(tile, i, highest[i], left);
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) {
        expected[i] += powers.at(i, j) * tile.at(i, j);
        sum[i] += Tile::column(j) < left ? exp2f(tile.at(i, j) - highest[i]) : 0.0f;
      }
    }
  }
  float loss = 0;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const float log2_sum = highest[i] + log2f(row_sum<Tile>(sum[i])), total = row_sum<Tile>(teacher_sum[i]);
    const float mean = row_sum<Tile>(expected[i]) / total;
    const int row = first_row + Tile::row(i);
    if (row >= p.rows || threadIdx.x % Tile::kSharers != 0) continue;
    out.log2_student[int64_t(blockIdx.x) * p.rows + row] = log2_sum;
    if (where.view == 0) out.log2_teacher[where.teacher_row(p) + row] = teacher_highest[i] + log2f(total);
    loss += log2_sum - mean;
  }
  for (int step = 1; step < kWarpLanes; step *= 2) loss += __shfl_xor_sync(kAllLanes, loss, step);
  float* of_warp = reinterpret_cast<float*>(stages);
  __syncthreads();  // all warps are done with the stages
  if (threadIdx.x % kWarpLanes == 0) of_warp[warp] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    const float weight = p.weight[where.view * p.images + where.image];
    float total = 0;
    for (int w = 0; w < int(blockDim.x) / kWarpLanes; ++w) total += of_warp[w];
    const float mean = total * (kLn2 / (float(p.rows) * float(p.heads)));
    out.losses[int64_t(blockIdx.x) * gridDim.y + blockIdx.y] = weight == 0 ? 0.0f : weight * mean;
  }
}

// -------------------------------------------------------------------------------------------------- gradient

// A warp's rows of one chunk of channels of the gradient, and D + D^T as the left factor of their product.
template <class T>
struct GradientTile {  // 16-bit values: the factor stays in the registers of the tile, as fragments of 16 columns each
  static constexpr int kColumns = 16;
  static constexpr size_t kScratchBytes = 0;
  float sum[8][4] = {};
  __device__ __forceinline__ float at(int i, int j) const { return sum[j / 2][i * 2 + j % 2]; }

  struct Factor {
    uint32_t a[4][4];
    __device__ __forceinline__ Factor(const Tile<T>& tile, char*) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &tile.sum[0][2 * k + i / 2][i % 2 * 2];
          const T rounded[2] = {T(pair[0]), T(pair[1])};
          memcpy(&a[k][i], rounded, 4);
        }
    }
  };

  __device__ __forceinline__ void add(const Factor& factor, const char* chunk) {
    const int lane = int(threadIdx.x) % kWarpLanes;
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t b[4];
        load_transposed(b, chunk + chunk_offset(k * 16 + lane / 8 % 2 * 8 + lane % 8, 2 * pair + lane / 16));
        multiply_add<T>(sum[2 * pair], factor.a[k], b[0], b[1]);
        multiply_add<T>(sum[2 * pair + 1], factor.a[k], b[2], b[3]);
      }
  }
};

template <>
struct GradientTile<float> {  // fp32 values: lanes need each other's columns, so the factor is in shared memory
  static constexpr int kColumns = 4, kStride = kTileColumns + 8;
  static constexpr size_t kScratchBytes = kWarpRows * kStride * sizeof(float);
  float sum[Tile<float>::kRows][kColumns] = {};
  __device__ __forceinline__ float at(int i, int j) const { return sum[i][j]; }

  struct Factor {
    const float* shared;
    __device__ __forceinline__ Factor(Tile<float>& tile, char* scratch) : shared(reinterpret_cast<float*>(scratch)) {
      __syncwarp();  // all lanes are done with the tile before
#pragma unroll
      for (int i = 0; i < Tile<float>::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Tile<float>::kColumns; ++j)
          reinterpret_cast<float*>(scratch)[Tile<float>::row(i) * kStride + Tile<float>::column(j)] = tile.at(i, j);
      __syncwarp();
    }
  };

  __device__ __forceinline__ void add(const Factor& factor, const char* chunk) {
#pragma unroll 2
    for (int m = 0; m < kTileColumns; ++m) {
      float b[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int channel = Tile<float>::column(j);
        b[j] = *reinterpret_cast<const float*>(chunk + chunk_offset(m, channel / 4) + channel % 4 * 4);
      }
#pragma unroll
      for (int i = 0; i < Tile<float>::kRows; ++i) {
        const float a = factor.shared[Tile<float>::row(i) * kStride + m];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[i][j] += a * b[j];
      }
    }
  }
};

struct GradientArguments {
  const float* log2_student;
  const float* log2_teacher;
  const float* grad_loss;  // scalar
  void* gradient;          // [views, images, heads, rows, channels], fp32 or as the features
  bool exact;              // fp32
};

// p_nm + p_mn of a tile's relations. The sums are read again for every tile, to save registers.
template <class T>
__device__ __forceinline__ void both_probabilities(Tile<T>& tile, const float* log2_sums, int first_row, int first_column, int rows) {
#pragma unroll
  for (int j = 0; j < Tile<T>::kColumns; ++j) {
    const float of_column = log2_sums[min_int(first_column + Tile<T>::column(j), rows - 1)];
#pragma unroll
    for (int i = 0; i < Tile<T>::kRows; ++i) {
      const float of_row = log2_sums[min_int(first_row + Tile<T>::row(i), rows - 1)];
      tile.at(i, j) = exp2f(tile.at(i, j) - of_row) + exp2f(tile.at(i, j) - of_column);
    }
  }
}

// A block makes CHUNKS chunks of channels.
template <class T, int CHUNKS, int WARPS>
__global__ void __launch_bounds__(WARPS * kWarpLanes, 1) gradient_kernel(Problem<T> p, int rows_of_block, GradientArguments out) {
  using Tile = Tile<T>;
  const BlockSample where(p);
  const OwnRows<T> own(shared_memory(), p, where, rows_of_block);
  char* stages = shared_memory() + (p.teacher.chunks() + p.student.chunks()) * rows_of_block * kChunkBytes;
  const int warp = int(threadIdx.x) / kWarpLanes, first_row = own.first_row + warp * kWarpRows;
  char* scratch = stages + kStages * kStageBytes + warp * GradientTile<T>::kScratchBytes;
  const int first_chunk = int(blockIdx.z) * CHUNKS, chunks = min_int(CHUNKS, p.student.chunks() - first_chunk);
  Stream<T> stream(p, where, stages, first_chunk, chunks);
  const float* log2_student = out.log2_student + int64_t(blockIdx.x) * p.rows;
  const float* log2_teacher = out.log2_teacher + where.teacher_row(p);
  GradientTile<T> gradient[CHUNKS];
  for (int t = 0; t < p.tiles(); ++t) {
    const int first = t * kTileColumns;
    Tile target, tile;
    compute_relations(target, own, stream, 0, p.teacher.chunks(), p.teacher.scale);
    both_probabilities(target, log2_teacher, first_row, first, p.rows);
    compute_relations(tile, own, stream, p.teacher.chunks(), p.student.chunks(), p.student.scale);
    both_probabilities(tile, log2_student, first_row, first, p.rows);
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j)
        tile.at(i, j) = first + Tile::column(j) < p.rows ? (tile.at(i, j) - target.at(i, j)) * kUnit : 0.0f;
    const typename GradientTile<T>::Factor factor(tile, scratch);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
      if (c < chunks) gradient[c].add(factor, stream.next());
  }
  const float weight = p.weight[where.view * p.images + where.image];
  const float unit = *out.grad_loss * weight * (p.student.scale * kLn2 / (float(p.rows) * float(p.heads))) / kUnit;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < GradientTile<T>::kColumns; ++j) {
        const int row = first_row + Tile::row(i), channel = (first_chunk + c) * kChunkChannels<T> + Tile::column(j);
        if (c >= chunks || row >= p.rows || channel >= p.student.channels) continue;
        const int64_t at = (int64_t(blockIdx.x) * p.rows + row) * p.student.channels + channel;
        const float value = weight == 0 ? 0.0f : gradient[c].at(i, j) * unit;
        if (out.exact)
          static_cast<float*>(out.gradient)[at] = value;
        else
          static_cast<T*>(out.gradient)[at] = T(value);
      }
}

// ------------------------------------------------------------------------------------------------ launch

template <class T>
Side<T> side_of(const Tensor& x, double scale) {
  const int first = x.dim() == 5;  // only the student has views
  const T* data = static_cast<const T*>(x.data_ptr());
  STD_TORCH_CHECK(x.size(first + 3) <= 1 || x.stride(first + 3) == 1,
                  "self_relation: rows must have dense channels, got strided ones; call the Python function.");
  const int64_t view_stride = first ? x.stride(0) : 0;
  return {data,
          view_stride,
          x.stride(first),
          x.stride(first + 1),
          x.stride(first + 2),
          int(x.size(first + 3)),
          rows_aligned(data, {view_stride, x.stride(first), x.stride(first + 1), x.stride(first + 2)}),
          float(scale * double(kLog2e))};
}

float* pointer(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

template <class T>
Problem<T> problem_of(const Tensor& student, const Tensor& teacher, double student_scale, double teacher_scale, const Tensor& weight) {
  return {side_of<T>(student, student_scale), side_of<T>(teacher, teacher_scale), pointer(weight),
          int(student.size(0)), int(student.size(1)), int(student.size(2)), int(student.size(3))};
}

// As many warps as fit, each with rows of its own, and blocks of equal size.
template <class T>
int warps_for(const Problem<T>& p, int most, size_t scratch_bytes, size_t limit) {
  const int all = (p.rows + kWarpRows - 1) / kWarpRows;
  int warps = std::min(all, most);
  const auto bytes = [&](int count) { return own_bytes(p, count * kWarpRows) + kStages * kStageBytes + count * scratch_bytes; };
  while (warps > 1 && bytes(warps) > limit) --warps;
  STD_TORCH_CHECK(bytes(warps) <= limit, "self_relation: rows of ", p.student.channels, " and ", p.teacher.channels,
                  " channels need ", bytes(warps), " bytes of shared memory and this GPU has ", limit,
                  "; use force(self_relation='triton').");
  const int blocks = (all + warps - 1) / warps;
  return (all + blocks - 1) / blocks;
}

// The first result has to be summed; the last is empty: on a GPU the backward makes the gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor> self_relation_fwd(const Tensor& student, const Tensor& teacher, double student_scale,
                                                             double teacher_scale, const Tensor& weight, bool gradients) {
  STD_TORCH_CHECK(!gradients, "self_relation: gradients must be false in CUDA, got true; call the Python function.");
  const OnDevice device(student);
  const auto allocate = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(student, sizes, ScalarType::Float); };
  Tensor log2_student = allocate({student.size(0), student.size(1), student.size(2), student.size(3)});
  Tensor log2_teacher = allocate({teacher.size(0), teacher.size(1), teacher.size(2)}), losses = allocate({0});
  with_float_type(student, "self_relation", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto p = problem_of<T>(student, teacher, student_scale, teacher_scale, weight);
    const int warps = warps_for(p, kMaxWarps, 0, device.shared_memory_limit()), rows = warps * kWarpRows;
    const int blocks = (p.rows + rows - 1) / rows;
    losses = allocate({p.samples(), blocks});
    launch(device, statistics_kernel<T>, dim3{unsigned(p.samples()), unsigned(blocks), 1}, warps * kWarpLanes,
           own_bytes(p, rows) + kStages * kStageBytes, p, rows, StatisticsOutputs{pointer(log2_student), pointer(log2_teacher), pointer(losses)});
  });
  return {losses, log2_student, log2_teacher, allocate({0})};
}

template <class T, int CHANNELS, int WARPS>
void launch_gradient(const OnDevice& device, const Problem<T>& p, const GradientArguments& out) {
  constexpr int kChunks = CHANNELS / kChunkChannels<T>;
  constexpr size_t kScratch = GradientTile<T>::kScratchBytes;
  const int warps = warps_for(p, WARPS, kScratch, device.shared_memory_limit()), rows = warps * kWarpRows;
  const dim3 grid{unsigned(p.samples()), unsigned((p.rows + rows - 1) / rows), unsigned((p.student.chunks() + kChunks - 1) / kChunks)};
  launch(device, gradient_kernel<T, kChunks, WARPS>, grid, warps * kWarpLanes, own_bytes(p, rows) + kStages * kStageBytes + warps * kScratch, p,
         rows, out);
}

// The gradient of the student's features, in fp32 if `exact`, else in their dtype.
Tensor self_relation_bwd(const Tensor& student, const Tensor& teacher, double student_scale, double teacher_scale, const Tensor& weight,
                         const Tensor& log2_student, const Tensor& log2_teacher, const Tensor& grad_loss, bool exact) {
  const OnDevice device(student);
  const std::vector<int64_t> sizes{student.size(0), student.size(1), student.size(2), student.size(3), student.size(4)};
  Tensor gradient = torch::stable::new_empty(student, sizes, exact ? ScalarType::Float : student.scalar_type());
  const GradientArguments out{pointer(log2_student), pointer(log2_teacher), pointer(grad_loss), gradient.data_ptr(), exact};
  with_float_type(student, "self_relation", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto p = problem_of<T>(student, teacher, student_scale, teacher_scale, weight);
    p.student.channels <= 64 ? launch_gradient<T, 64, kMaxWarps>(device, p, out) : launch_gradient<T, 256, kWideWarps>(device, p, out);
  });
  return gradient;
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) {
  m.impl("self_relation_fwd", TORCH_BOX(&patchlight::self_relation_fwd));
  m.impl("self_relation_bwd", TORCH_BOX(&patchlight::self_relation_bwd));
}
