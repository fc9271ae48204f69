// self_relation on the CPU. One image and head at a time, a strip of whose relations (all of them up to 1024 rows) is in a
// thread's cache; the teacher's are made once for all views of the student.
//   compute_relations   the strip's products; blocks that mirror each other are multiplied once
//   teacher_statistics  the teacher's relations to powers of two, and their sums
//   student_statistics  cross-entropy, and the student's relations to D = Q - P
//   symmetrize          D + D^T where the strip has both
//   gradient            (D + D^T) f; for rows outside of the strip, the part of D^T that the strip has
// Relations are in blocks of 32 x 32; block (p, q) has [m of panel q][n of panel p] for the softmax of row n over m: the rows
// of a panel are adjacent in memory, so sums over m need no shuffles, and a block is the right factor of a product in place.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "../buffer.h"
#include "../native.h"
#include "../product.h"
#include "../simd.h"

namespace patchlight {
namespace {

constexpr int64_t kBlock = kPanel * kPanel;
constexpr int64_t kStrip = 1 << 20;    // relations of a strip: 4 MiB, and as many of the teacher's
constexpr int64_t kGradientPanels = 6;     // of a product: 24 KiB of relations stay in L1
constexpr double kLog2e = 1.44269504088896341;
constexpr double kLn2 = 0.69314718055994531;

// ------------------------------------------------------------------------------------------------- blocks

typedef float Vector4 __attribute__((vector_size(16)));
typedef float UnalignedVector4 __attribute__((vector_size(16), aligned(4), may_alias));

struct Square {  // 4 x 4 values
  Vector4 row[4];
  explicit Square(const float* from) {
    for (int i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const UnalignedVector4*>(from + i * kPanel);
  }
  void store(float* to) const {
    for (int i = 0; i < 4; ++i) *reinterpret_cast<UnalignedVector4*>(to + i * kPanel) = row[i];
  }
  void transpose() {
    const Vector4 a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5), b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
    const Vector4 c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7), d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    row[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5), row[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    row[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5), row[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  }
};

void mirror(const float* from, float* to) {
  for (int i = 0; i < kPanel; i += 4)
    for (int j = 0; j < kPanel; j += 4) {
      Square square(from + i * kPanel + j);
      square.transpose();
      square.store(to + j * kPanel + i);
    }
}

// x = x + y^T and then y = x^T; x and y may be the same block.
void add_mirrored(float* x, float* y) {
  for (int i = 0; i < kPanel; i += 4)
    for (int j = x == y ? i : 0; j < kPanel; j += 4) {
      Square sum(x + i * kPanel + j), other(y + j * kPanel + i);
      other.transpose();
      for (int k = 0; k < 4; ++k) sum.row[k] += other.row[k];
      sum.store(x + i * kPanel + j);
      sum.transpose();
      sum.store(y + j * kPanel + i);
    }
}

// ------------------------------------------------------------------------------------------------ softmax

// The student's relations as exponentiate_panel has the teacher's; `expected` sums (relation - highest) times the teacher's powers.
CLONES void exponentiate_student(float* __restrict panel, const float* __restrict target, int64_t rows, float* __restrict highest,
                        float* __restrict sum, float* __restrict expected) {
  float top[kPanel], total[kPanel], mean[kPanel];
  for (int i = 0; i < kPanel; ++i) top[i] = -FLT_MAX, total[i] = mean[i] = 0;
  for (int64_t m = 0; m < rows; ++m)
    for (int i = 0; i < kPanel; ++i) top[i] = panel[m * kPanel + i] > top[i] ? panel[m * kPanel + i] : top[i];
  for (int64_t m = 0; m < rows; ++m)
    for (int i = 0; i < kPanel; ++i) {
      const float below = panel[m * kPanel + i] - top[i], power = exp2_inline(below);
      mean[i] += target[m * kPanel + i] * below;
      panel[m * kPanel + i] = power;
      total[i] += power;
    }
  for (int i = 0; i < kPanel; ++i) highest[i] = top[i], sum[i] = total[i], expected[i] = mean[i];
}

// D = Q - P from both sides' powers and their sums.
CLONES void subtract_panel(float* __restrict panel, const float* __restrict target, int64_t rows, const float* __restrict sum,
                           const float* __restrict target_sum) {
  float inverse[kPanel], target_inverse[kPanel];
  for (int i = 0; i < kPanel; ++i) inverse[i] = 1 / sum[i], target_inverse[i] = 1 / target_sum[i];
  for (int64_t m = 0; m < rows; ++m)
    for (int i = 0; i < kPanel; ++i)
      panel[m * kPanel + i] = panel[m * kPanel + i] * inverse[i] - target[m * kPanel + i] * target_inverse[i];
}

// ------------------------------------------------------------------------------------------------ a sample

inline float value_of(float x) { return x; }
inline float value_of(Half x) { return half_to_float(x.x); }
inline float value_of(BFloat16 x) { return bits_to_float(uint32_t(x.x) << 16); }

template <class T>
struct Rows {  // of one image and head
  const T* data;
  int64_t row_stride, channel_stride;
};

struct Problem {
  int64_t views, images, heads, rows, width, teacher_width;
  float root, teacher_root;  // of the scale in units of log2: features times the root have relations in those units
  double student_scale;
  const float* weight;  // [views, images]
  float* log2_student;  // [views, images, heads, rows]
  float* log2_teacher;  // [images, heads, rows]
  float* dstudent;      // [views, images, heads, rows, width], or null
  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t in_panel(int64_t panel) const { return std::min<int64_t>(kPanel, rows - panel * kPanel); }
  float of(int64_t view, int64_t image) const { return weight[view * images + image]; }
};

template <class F>
void in_parallel(int64_t tasks, F f) {  // one after another inside of another parallel loop
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) f(i);
  });
}

class Sample {
 public:
  explicit Sample(const Problem& problem)
      : p(problem), panels(p.panels()), strip(std::clamp<int64_t>(kStrip / (panels * kBlock), 1, panels)),
        student(panels * p.width * kPanel), teacher(panels * p.teacher_width * kPanel), relations(strip * panels * kBlock),
        powers(strip * panels * kBlock), powers_sum(strip * kPanel) {}

  // `losses` [views, panels] gets the sum over a panel's rows.
  template <class T, class Views>
  void run(int64_t image, int64_t head, const Rows<T>& teacher_rows, const Views& student_rows, double* losses) {
    const int64_t at = image * p.heads + head;
    bool counts = false;
    for (int64_t s = 0; s < p.views; ++s) p.of(s, image) == 0 ? skip(s, at) : void(counts = true);
    float* log2_teacher = p.log2_teacher + at * p.rows;
    if (!counts) std::fill_n(log2_teacher, p.rows, 0.0f);
    for (first = 0; counts && first < panels; first += strip) {
      last = std::min(first + strip, panels);
      if (first == 0) pack(teacher_rows, teacher, p.teacher_width, p.teacher_root);
      compute_relations(teacher, p.teacher_width, powers);
      in_parallel(last - first, [&](int64_t i) { teacher_statistics(first + i, log2_teacher); });
      for (int64_t s = 0; s < p.views; ++s) {
        if (p.of(s, image) == 0) continue;
        const int64_t of_view = s * p.images * p.heads + at;
        pack(student_rows(s), student, p.width, p.root);
        compute_relations(student, p.width, relations);
        in_parallel(last - first, [&](int64_t i) {
          losses[s * panels + first + i] = student_statistics(first + i, p.log2_student + of_view * p.rows);
        });
        if (!p.dstudent) continue;
        in_parallel(last - first, [&](int64_t i) { symmetrize(interleaved(i)); });
        const float factor = float(p.student_scale * p.of(s, image) / (double(p.heads * p.rows) * p.root));
        in_parallel(panels, [&](int64_t q) { gradient(q, factor, p.dstudent + of_view * p.rows * p.width); });
      }
    }
  }

 private:
  // A block of the student's or the teacher's relations.
  float* block(const Buffer& strip_of, int64_t panel, int64_t other) const {
    return strip_of.at(((panel - first) * panels + other) * kBlock);
  }
  bool within(int64_t panel) const { return panel >= first && panel < last; }

  // The panel of a task: short and long ones alternate, so that threads with consecutive tasks have equal work.
  int64_t interleaved(int64_t i) const { return i % 2 ? last - 1 - i / 2 : first + i / 2; }

  void skip(int64_t view, int64_t at) const {
    const int64_t of_view = view * p.images * p.heads + at;
    std::fill_n(p.log2_student + of_view * p.rows, p.rows, 0.0f);
    if (p.dstudent) std::fill_n(p.dstudent + of_view * p.rows * p.width, p.rows * p.width, 0.0f);
  }

  // Packs rows to panels of 32, [width][32] each, times `root`; lanes without a row are zero.
  template <class T>
  void pack(const Rows<T>& from, const Buffer& to, int64_t width, float root) const {
    in_parallel(panels, [&](int64_t q) {
      const T* data = from.data + q * kPanel * from.row_stride;
      float* out = to.at(q * width * kPanel);
      const int64_t lanes = p.in_panel(q);
      for (int64_t e = 0; e < width; ++e) {
        for (int64_t i = 0; i < lanes; ++i) out[e * kPanel + i] = root * value_of(data[i * from.row_stride + e * from.channel_stride]);
        for (int64_t i = lanes; i < kPanel; ++i) out[e * kPanel + i] = 0;
      }
    });
  }

  void compute_relations(const Buffer& features, int64_t width, const Buffer& out) const {
    in_parallel(last - first, [&](int64_t i) {
      const int64_t panel = interleaved(i);
      for (int64_t q = 0; q < panels; ++q) {
        if (within(q) && q > panel) continue;
        multiply_panel({features.at(q * width * kPanel), 1, kPanel, 0, features.at(panel * width * kPanel), kPanel, 0,
                        block(out, panel, q), kPanel, p.in_panel(q), width, 1, false});
        if (within(q) && q < panel) mirror(block(out, panel, q), block(out, q, panel));
      }
    });
  }

  void teacher_statistics(int64_t panel, float* log2_teacher) const {
    float highest[kPanel], *sum = powers_sum.at((panel - first) * kPanel), *tile = block(powers, panel, 0);
    exponentiate_panel(tile, p.rows, highest, sum);
    for (int64_t i = 0; i < p.in_panel(panel); ++i) log2_teacher[panel * kPanel + i] = highest[i] + std::log2(sum[i]);
  }

  double student_statistics(int64_t panel, float* log2_student) const {
    float highest[kPanel], sum[kPanel], expected[kPanel];
    float *tile = block(relations, panel, 0), *target = block(powers, panel, 0), *target_sum = powers_sum.at((panel - first) * kPanel);
    exponentiate_student(tile, target, p.rows, highest, sum, expected);
    if (p.dstudent) subtract_panel(tile, target, p.rows, sum, target_sum);
    double loss = 0;
    for (int64_t i = 0; i < p.in_panel(panel); ++i) {
      const double log2_sum = std::log2(sum[i]);
      log2_student[panel * kPanel + i] = float(highest[i] + log2_sum);
      loss += log2_sum - double(expected[i]) / target_sum[i];
    }
    return loss * kLn2;
  }

  void symmetrize(int64_t panel) const {
    for (int64_t q = first; q <= panel; ++q) add_mirrored(block(relations, panel, q), block(relations, q, panel));
  }

  void gradient(int64_t panel, float factor, float* dstudent) const {
    thread_local std::vector<float> sums;  // [width][32]
    sums.resize(p.width * kPanel);
    PanelProduct product{nullptr, kPanel, 1, p.width * kPanel, nullptr, kPanel, kBlock, sums.data(), kPanel, p.width, kPanel, 1, false};
    const auto add = [&](int64_t other, const float* right, int64_t others) {
      product.a = student.at(other * p.width * kPanel), product.b = right, product.outer = others;
      product.inner = p.in_panel(other + others - 1);
      multiply_panel(product);
      product.accumulate = true;
    };
    if (within(panel)) {
      const int64_t full = p.rows / kPanel;
      for (int64_t q = 0; q < full; q += kGradientPanels) add(q, block(relations, panel, q), std::min(kGradientPanels, full - q));
      if (full < panels) add(full, block(relations, panel, full), 1);
    } else {
      float mirrored[kBlock];
      for (int64_t q = first; q < last; ++q) {
        mirror(block(relations, q, panel), mirrored);
        add(q, mirrored, 1);
      }
    }
    for (int64_t i = 0; i < p.in_panel(panel); ++i) {
      float* row = dstudent + (panel * kPanel + i) * p.width;
      for (int64_t e = 0; e < p.width; ++e) row[e] = (first ? row[e] : 0) + factor * sums[e * kPanel + i];
    }
  }

  const Problem& p;
  int64_t panels, strip;        // of all rows; of a strip
  int64_t first = 0, last = 0;  // panels of the strip
  Buffer student, teacher;      // features in panels
  Buffer relations;             // of the student
  Buffer powers, powers_sum;    // of the teacher
};

std::tuple<Tensor, Tensor, Tensor, Tensor> self_relation_fwd(const Tensor& student, const Tensor& teacher, double student_scale,
                                                             double teacher_scale, const Tensor& weight, bool gradients) {
  const int64_t views = student.size(0), images = student.size(1), heads = student.size(2), rows = student.size(3);
  const auto allocate = [&](std::vector<int64_t> sizes) { return torch::stable::new_empty(student, sizes, ScalarType::Float); };
  const auto pointer = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  Tensor loss = allocate({}), log2_student = allocate({views, images, heads, rows}), log2_teacher = allocate({images, heads, rows});
  Tensor dstudent = allocate(gradients ? std::vector<int64_t>{views, images, heads, rows, student.size(4)} : std::vector<int64_t>{0});
  const Problem p{views, images, heads, rows, student.size(4), teacher.size(3), float(std::sqrt(student_scale * kLog2e)),
                  float(std::sqrt(teacher_scale * kLog2e)), student_scale, static_cast<const float*>(weight.data_ptr()), pointer(log2_student),
                  pointer(log2_teacher), gradients ? pointer(dstudent) : nullptr};
  const int64_t samples = images * heads, panels = p.panels();
  std::vector<double> losses(samples * views * panels, 0.0);
  with_float_type(student, "self_relation", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* students = static_cast<const T*>(student.data_ptr());
    const auto* teachers = static_cast<const T*>(teacher.data_ptr());
    const auto run = [&](Sample& sample, int64_t i) {
      const int64_t image = i / heads, head = i % heads;
      const Rows<T> of_teacher{teachers + image * teacher.stride(0) + head * teacher.stride(1), teacher.stride(2), teacher.stride(3)};
      const auto of_student = [&](int64_t s) {
        return Rows<T>{students + s * student.stride(0) + image * student.stride(1) + head * student.stride(2), student.stride(3),
                       student.stride(4)};
      };
      sample.run(image, head, of_teacher, of_student, losses.data() + i * views * panels);
    };
    if (samples >= 2 * int64_t(torch::stable::get_num_threads())) {
      torch::stable::parallel_for(0, samples, 1, [&](int64_t from, int64_t to) {
        Sample sample(p);
        for (int64_t i = from; i < to; ++i) run(sample, i);
      });
    } else {  // few: the threads divide each
      Sample sample(p);
      for (int64_t i = 0; i < samples; ++i) run(sample, i);
    }
  });
  double total = 0;
  for (int64_t i = 0; i < samples * views * panels; ++i) {
    const float of_sample = p.of(i / panels % views, i / panels / views / heads);
    if (of_sample != 0) total += losses[i] * of_sample / double(heads * rows);
  }
  *pointer(loss) = float(total);
  return {loss, log2_student, log2_teacher, dstudent};
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) { m.impl("self_relation_fwd", TORCH_BOX(&patchlight::self_relation_fwd)); }
