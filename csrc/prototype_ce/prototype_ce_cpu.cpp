// prototype_ce on the CPU: four products, each computed once, and nothing of size rows x prototypes is kept.
// A chunk of positions at a time, a lane for every row of every view: both branches have their positions in the same order.
//   compute_statistics  logits of 64 prototypes for all lanes; their exponentials, maxima, sums and the pairs' cross terms
//   merge_blocks        log-sum-exps from the blocks' maxima and sums, losses from the cross terms
//   logit_gradients     exponentials to gradients of the logits, and at once the gradient of these 64 prototypes
//   row_gradients       the gradient of the rows
// Logits are in units of log2, so that exponentials are powers of two. Lanes are adjacent in memory, prototypes 32 lanes
// apart: sums over prototypes need no shuffles, and each product has panels of 32 columns.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <vector>

#include "../buffer.h"
#include "../native.h"
#include "../product.h"
#include "../simd.h"

namespace patchlight {
namespace {

constexpr int64_t kGroup = 16;              // lanes of one view come in groups of this many; two make a panel
constexpr int64_t kBlock = 64;              // prototypes at a time: with 256 channels they and a panel of rows fit 96 KiB
constexpr int64_t kPositions = 256;         // at a time, at most; with fewer, threads would wait for each other more often
constexpr int64_t kChunkBytes = 5 << 20;    // of exponentials, if at least one group of positions fits
constexpr int64_t kGradientWidth = 64;      // channels of a task of row_gradients
constexpr int64_t kGradientBlock = 256;     // prototypes of one product there: 32 KiB of gradients stay in L1
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.69314718055994531;

struct Weights {  // fp32 rows
  const float* data;
  int64_t stride;
  const float* row(int64_t k) const { return data + k * stride; }
};

template <class T>
struct Rows {  // z[view, position, :]
  const T* data;
  int64_t view_stride, stride;
  explicit Rows(const Tensor& z) : data(static_cast<const T*>(z.data_ptr())), view_stride(z.stride(0)), stride(z.stride(1)) {}
  const T* row(int64_t view, int64_t position) const { return data + view * view_stride + position * stride; }
};

// The lanes of a chunk, of the student or of the teacher.
struct Side {
  Side(int64_t view_count, int64_t positions, int64_t width, int64_t prototypes, bool keeps)
      : views(view_count), lanes(round_up(view_count * positions, kPanel)), panels(lanes / kPanel), prototypes_(prototypes),
        blocks((prototypes + kBlock - 1) / kBlock), rows(lanes * width), highest(blocks * lanes), sum(blocks * lanes),
        log2_sum(lanes), values_(keeps ? lanes * prototypes : 0) {}
  // A panel's exponentials, later gradients: [prototypes from `first` on][32].
  float* values(int64_t panel, int64_t first) const { return values_.at((panel * prototypes_ + first) * kPanel); }

  int64_t views, lanes, panels;

 private:
  int64_t prototypes_;

 public:
  int64_t blocks;
  Buffer rows;          // [panels][width][32], times 1 / (temperature ln 2)
  Buffer highest, sum;  // [blocks][lanes]; after `normalize` highest is the factor from a block's exponentials to probabilities
  Buffer log2_sum;      // [lanes] of the powers of two

 private:
  Buffer values_;
};

// Fills one panel with the positions from `first` on; lanes without a row are zero. `columns` gets the same rows unscaled,
// in panels of channels: [width / 32][lanes][32].
template <class T>
void pack(const Rows<T>& z, const Side& side, int64_t panel, int64_t first, int64_t end, int64_t positions, int64_t width,
          float scale, float* columns) {
  std::vector<float> row(round_up(width, kPanel));
  float* out = side.rows.at(panel * width * kPanel);
  for (int64_t lane = panel * kPanel; lane < (panel + 1) * kPanel; ++lane) {
    const int64_t view = lane / positions, position = lane % positions;
    if (view < side.views && first + position < end) {
      const T* from = z.row(view, first + position);
      if constexpr (std::is_same_v<T, float>)
        std::copy(from, from + width, row.data());
      else
        widen(from, row.data(), width);
    } else {
      std::fill(row.begin(), row.end(), 0.0f);
    }
    for (int64_t d = 0; d < width; ++d) out[d * kPanel + lane % kPanel] = row[d] * scale;
    if (columns)
      for (int64_t d = 0; d < width; d += kPanel) std::copy_n(row.data() + d, kPanel, columns + (d * side.lanes) + lane * kPanel);
  }
}

CLONES void add_bias(float* __restrict tile, int64_t count, const float* bias, float scale) {
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kPanel; ++i) tile[k * kPanel + i] += bias[k] * scale;
}

// out[i] = sum over a block of a teacher's exponential times a student's logit, for one group of lanes.
CLONES void cross(const float* teacher, const float* student, int64_t count, float* __restrict out) {
  float total[kGroup] = {};
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kGroup; ++i) total[i] += teacher[k * kPanel + i] * student[k * kPanel + i];
  for (int i = 0; i < kGroup; ++i) out[i] = total[i];
}

CLONES void normalize(float* __restrict highest, const float* __restrict sum, int64_t blocks, int64_t lanes, float* __restrict lse) {
  for (int64_t i = 0; i < lanes; ++i) lse[i] = highest[i];
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t i = 0; i < lanes; ++i) lse[i] = highest[b * lanes + i] > lse[i] ? highest[b * lanes + i] : lse[i];
  std::vector<float> total(lanes, 0.0f);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < lanes; ++i) total[i] += sum[b * lanes + i] * exp2_inline(highest[b * lanes + i] - lse[i]);
  for (int64_t i = 0; i < lanes; ++i) lse[i] += std::log2(total[i]);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < lanes; ++i) highest[b * lanes + i] = exp2_inline(highest[b * lanes + i] - lse[i]);
}

CLONES void scale_group(float* __restrict tile, int64_t count, const float* __restrict factor) {
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kGroup; ++i) tile[k * kPanel + i] *= factor[i];
}

CLONES void subtract_group(float* __restrict tile, const float* __restrict other, int64_t count, const float* __restrict factor) {
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < kGroup; ++i) tile[k * kPanel + i] -= factor[i] * other[k * kPanel + i];
}

// The same for all chunks.
struct Problem {
  int64_t students, teachers, rows, width, prototypes;
  Weights weights, teacher_weights;
  float scale, teacher_scale;  // 1 / (temperature ln 2)
  const float *pair_weight, *row_weight, *bias;
  float pair(int64_t teacher, int64_t student) const { return pair_weight[teacher * students + student]; }
};

struct Results {
  double loss = 0;
  float *log2_student, *log2_teacher, *dz, *dprototypes;  // dz null: no gradients
  float z_unit;                                           // factor from the gradient of a logit in units of log2 to that of z
};

class Chunks {
 public:
  Chunks(const Problem& problem, Results& results)
      : p(problem), out(results), positions(positions_at_once(problem)),
        student(p.students, positions, p.width, p.prototypes, out.dz != nullptr),
        teacher(p.teachers, positions, p.width, p.prototypes, out.dz != nullptr), cross_(student.blocks * p.teachers * student.lanes),
        columns(out.dz ? student.lanes * round_up(p.width, kPanel) : 0) {}

  // Three parallel regions a chunk: the next rows are packed beside row_gradients, as every region costs a wait.
  template <class T>
  void run(const Rows<T>& z, const Rows<T>& teacher_z) {
    const int64_t parts = out.dz ? (p.width + kGradientWidth - 1) / kGradientWidth : 0;
    const int64_t gradient_tasks = student.panels * parts, pack_tasks = student.panels + teacher.panels;
    const auto pack_next = [&](int64_t i, int64_t next) {
      if (i < student.panels)
        pack(z, student, i, next, p.rows, positions, p.width, p.scale, out.dz ? columns.at(0) : nullptr);
      else
        pack(teacher_z, teacher, i - student.panels, next, p.rows, positions, p.width, p.teacher_scale, nullptr);
    };
    in_parallel(pack_tasks, [&](int64_t i) { pack_next(i, 0); });
    for (first = 0; first < p.rows; first += positions) {
      count = std::min(positions, p.rows - first);
      in_parallel(student.blocks, [&](int64_t block) { compute_statistics(block); });
      merge_blocks();
      if (out.dz) in_parallel(student.blocks, [&](int64_t block) { logit_gradients(block); });
      const int64_t next = first + positions;
      in_parallel(gradient_tasks + (next < p.rows ? pack_tasks : 0), [&](int64_t i) {
        i < gradient_tasks ? row_gradients(i / parts, i % parts * kGradientWidth) : pack_next(i - gradient_tasks, next);
      });
    }
  }

 private:
  static int64_t positions_at_once(const Problem& p) {
    const int64_t bytes = (p.students + p.teachers) * p.prototypes * int64_t(sizeof(float));
    const int64_t fitting = std::max<int64_t>(kChunkBytes / std::max<int64_t>(bytes, 1) / kGroup * kGroup, kGroup);
    return std::min({fitting, kPositions, round_up(p.rows, kGroup)});
  }

  template <class F>
  static void in_parallel(int64_t tasks, F f) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) f(i);
    });
  }

  int64_t block_size(int64_t block) const { return std::min(kBlock, p.prototypes - block * kBlock); }

  void logits(const Side& side, const Weights& weights, int64_t panel, int64_t k, int64_t size, float* tile) const {
    multiply_panel({weights.row(k), weights.stride, 1, 0, side.rows.at(panel * p.width * kPanel), kPanel, 0, tile, kPanel, size,
                    p.width, 1, false});
  }

  // The group of teacher lanes with the positions of this group of student lanes.
  int64_t partner(int64_t view, int64_t lane) const { return view * positions + lane % positions; }

  float* cross_terms(int64_t block, int64_t view, int64_t lane) const {
    return cross_.at((block * p.teachers + view) * student.lanes + lane);
  }

  void compute_statistics(int64_t block) {
    const int64_t k = block * kBlock, size = block_size(block);
    const bool keeps = out.dz;
    thread_local std::vector<float> scratch;  // the teacher's tiles and one of the student's, if they are not kept
    scratch.resize((teacher.panels + 1) * kBlock * kPanel);
    const auto teacher_tile = [&](int64_t panel) {
      return keeps ? teacher.values(panel, k) : scratch.data() + panel * kBlock * kPanel;
    };
    for (int64_t panel = 0; panel < teacher.panels; ++panel) {
      float* tile = teacher_tile(panel);
      const int64_t at = block * teacher.lanes + panel * kPanel;
      logits(teacher, p.teacher_weights, panel, k, size, tile);
      if (p.bias) add_bias(tile, size, p.bias + k, p.teacher_scale);
      exponentiate_panel(tile, size, teacher.highest.at(at), teacher.sum.at(at));
    }
    for (int64_t panel = 0; panel < student.panels; ++panel) {
      float* tile = keeps ? student.values(panel, k) : scratch.data() + teacher.panels * kBlock * kPanel;
      const int64_t at = block * student.lanes + panel * kPanel;
      logits(student, p.weights, panel, k, size, tile);
      for (int64_t lane = panel * kPanel; lane < (panel + 1) * kPanel; lane += kGroup)
        for (int64_t view = 0; view < p.teachers; ++view) {
          const int64_t other = partner(view, lane);
          cross(teacher_tile(other / kPanel) + other % kPanel, tile + lane % kPanel, size, cross_terms(block, view, lane));
        }
      exponentiate_panel(tile, size, student.highest.at(at), student.sum.at(at));
    }
  }

  void merge_blocks() {
    normalize(student.highest.at(0), student.sum.at(0), student.blocks, student.lanes, student.log2_sum.at(0));
    normalize(teacher.highest.at(0), teacher.sum.at(0), teacher.blocks, teacher.lanes, teacher.log2_sum.at(0));
    for (int64_t t = 0; t < p.teachers; ++t)
      for (int64_t r = 0; r < count; ++r) out.log2_teacher[t * p.rows + first + r] = *teacher.log2_sum.at(t * positions + r);
    std::vector<double> expected(positions);
    for (int64_t s = 0; s < p.students; ++s) {
      for (int64_t r = 0; r < count; ++r) out.log2_student[s * p.rows + first + r] = *student.log2_sum.at(s * positions + r);
      for (int64_t t = 0; t < p.teachers; ++t) {
        std::fill(expected.begin(), expected.end(), 0.0);
        for (int64_t block = 0; block < student.blocks; ++block) {
          const float* terms = cross_terms(block, t, s * positions);
          const float* share = teacher.highest.at(block * teacher.lanes + t * positions);
          for (int64_t r = 0; r < count; ++r) expected[r] += double(terms[r]) * share[r];
        }
        for (int64_t r = 0; r < count; ++r)
          out.loss += double(p.pair(t, s)) * p.row_weight[first + r] * (*student.log2_sum.at(s * positions + r) - expected[r]) * kLn2;
      }
    }
  }

  // The gradient of a logit (of the plain product, so with 1 / temperature): weight (A p_student - sum_t a_t p_teacher).
  void logit_gradients(int64_t block) {
    const int64_t k = block * kBlock, size = block_size(block);
    for (int64_t lane = 0; lane < student.lanes; lane += kGroup) {
      const int64_t s = lane / positions, position = lane % positions;
      float* tile = student.values(lane / kPanel, k) + lane % kPanel;
      float weight[kGroup], factor[kGroup], pairs = 0;
      for (int64_t i = 0; i < kGroup; ++i)
        weight[i] = s < p.students && position + i < count ? p.row_weight[first + position + i] * out.z_unit : 0.0f;
      if (s < p.students)
        for (int64_t t = 0; t < p.teachers; ++t) pairs += p.pair(t, s);
      for (int64_t i = 0; i < kGroup; ++i) factor[i] = pairs * weight[i] * *student.highest.at(block * student.lanes + lane + i);
      scale_group(tile, size, factor);
      for (int64_t t = 0; t < p.teachers && s < p.students; ++t) {
        const int64_t other = partner(t, lane);
        for (int64_t i = 0; i < kGroup; ++i)
          factor[i] = p.pair(t, s) * weight[i] * *teacher.highest.at(block * teacher.lanes + other + i);
        subtract_group(tile, teacher.values(other / kPanel, k) + other % kPanel, size, factor);
      }
    }
    for (int64_t d = 0; d < p.width; d += kPanel) {
      const int64_t fitting = std::min<int64_t>(kPanel, p.width - d);
      float* sum = out.dprototypes + k * p.width + d;
      float last_panel[kBlock * kPanel];  // for a last panel that is not full
      PanelProduct product{student.values(0, k), kPanel, 1, p.prototypes * kPanel, columns.at(d * student.lanes), kPanel,
                           kPanel * kPanel, sum, p.width, size, kPanel, student.panels, first > 0};
      if (fitting < kPanel) product.c = last_panel, product.c_row = kPanel, product.accumulate = false;
      multiply_panel(product);
      for (int64_t i = 0; i < size && fitting < kPanel; ++i)
        for (int64_t j = 0; j < fitting; ++j) sum[i * p.width + j] = (first > 0 ? sum[i * p.width + j] : 0) + last_panel[i * kPanel + j];
    }
  }

  // Channels [from, from + kPullWidth) of dz for the rows of one panel.
  void row_gradients(int64_t panel, int64_t from) {
    const int64_t wide = std::min(kGradientWidth, p.width - from);
    alignas(64) float transposed[kGradientWidth * kPanel];
    for (int64_t k = 0; k < p.prototypes; k += kGradientBlock)
      multiply_panel({p.weights.row(k) + from, 1, p.weights.stride, 0, student.values(panel, k), kPanel, 0, transposed, kPanel, wide,
                      std::min(kGradientBlock, p.prototypes - k), 1, k > 0});
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t lane = panel * kPanel + i, s = lane / positions, r = lane % positions;
      if (s >= p.students || r >= count) continue;
      float* row = out.dz + (s * p.rows + first + r) * p.width + from;
      for (int64_t d = 0; d < wide; ++d) row[d] = transposed[d * kPanel + i];
    }
  }

  const Problem& p;
  Results& out;
  int64_t positions;  // per chunk, a multiple of kGroup
  int64_t first = 0, count = 0;
  Side student, teacher;
  Buffer cross_;   // [blocks][teachers][student lanes]
  Buffer columns;  // the student's rows as the right factor of dprototypes
};

// The rows of a weight in fp32: in place, or in `copy`.
Weights in_float(const Tensor& weight, std::optional<Buffer>& copy) {
  Weights result{nullptr, weight.size(1)};
  with_float_type(weight, "prototype_ce", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* from = static_cast<const T*>(weight.data_ptr());
    if constexpr (std::is_same_v<T, float>) {
      result = {from, weight.stride(0)};
    } else {
      copy.emplace(weight.size(0) * weight.size(1));
      torch::stable::parallel_for(0, weight.size(0), 64, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) widen(from + k * weight.stride(0), copy->at(k * weight.size(1)), weight.size(1));
      });
      result.data = copy->at(0);
    }
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prototype_ce_fwd(
    const Tensor& z, const Tensor& prototypes, const Tensor& teacher_z, const Tensor& teacher_prototypes, double temperature,
    double teacher_temperature, const Tensor& pair_weight, const Tensor& row_weight, const std::optional<Tensor>& bias,
    bool gradients) {
  const int64_t students = z.size(0), teachers = teacher_z.size(0), rows = z.size(1), width = z.size(2), count = prototypes.size(0);
  STD_TORCH_CHECK(width <= 1 || (z.stride(2) == 1 && teacher_z.stride(2) == 1 && prototypes.stride(1) == 1 &&
                                 teacher_prototypes.stride(1) == 1),
                  "prototype_ce: rows must have dense channels, got strided ones; call the Python function.");
  std::optional<Buffer> copy, teacher_copy;
  const Problem problem{
      students, teachers, rows, width, count, in_float(prototypes, copy), in_float(teacher_prototypes, teacher_copy),
      float(kLog2e / temperature), float(kLog2e / teacher_temperature), static_cast<const float*>(pair_weight.data_ptr()),
      static_cast<const float*>(row_weight.data_ptr()), bias ? static_cast<const float*>(bias->data_ptr()) : nullptr};
  const auto allocate = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(z, sizes, ScalarType::Float); };
  const auto pointer = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  Tensor loss = allocate({}), log2_student = allocate({students, rows}), log2_teacher = allocate({teachers, rows});
  Tensor dz = allocate(gradients ? std::vector<int64_t>{students, rows, width} : std::vector<int64_t>{0});
  Tensor dprototypes = allocate(gradients ? std::vector<int64_t>{count, width} : std::vector<int64_t>{0});
  Results results{0, pointer(log2_student), pointer(log2_teacher), gradients ? pointer(dz) : nullptr, pointer(dprototypes),
                  float(1 / temperature)};
  with_float_type(z, "prototype_ce", [&](auto type) {
    using T = typename decltype(type)::type;
    Chunks(problem, results).run(Rows<T>(z), Rows<T>(teacher_z));
  });
  *pointer(loss) = float(results.loss);
  return {loss, log2_student, log2_teacher, dz, dprototypes};
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) { m.impl("prototype_ce_fwd", TORCH_BOX(&patchlight::prototype_ce_fwd)); }
