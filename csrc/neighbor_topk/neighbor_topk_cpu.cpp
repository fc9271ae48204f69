// neighbor_topk on the CPU. Similarity is symmetric, so each pair of neighbors is multiplied once: a patch takes its dot
// products with its neighbors that come later in the grid, four at a time together with its own norm, and reads the others'.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "../native.h"
#include "../simd.h"

namespace patchlight {
namespace {

constexpr float kEps = 1e-12f;     // norms below this count as this
constexpr float kNanRank = -2.0f;  // below every cosine
constexpr float kMissing = -std::numeric_limits<float>::infinity();
constexpr int kDotsAtOnce = 4;
constexpr int kPrefetchRows = 64;  // about 100 KB ahead: early enough for memory, small enough for L2

struct Row {
  const int* candidate;  // [places] patch index, ascending; -1 from `present` on
  const int* pair;       // [places] index of the pair's similarity
  int present;
};

// The neighbors of each patch, and the index of each pair's similarity: patch p owns the pairs with its later neighbors.
struct Neighborhood {
  virtual ~Neighborhood() = default;
  int patches, places, pairs;
  virtual int first(int p) const = 0;               // p's first pair; its pairs end where those of p + 1 start
  virtual int later(int p, int t) const = 0;        // the patch of p's pair number t
  virtual Row row(int p, int* scratch) const = 0;   // scratch: 2 * places integers
};

struct AllPatches : Neighborhood {
  explicit AllPatches(int count) { patches = count, places = count - 1, pairs = first(count); }
  int first(int p) const override { return int(int64_t(p) * (2 * int64_t(patches) - p - 1) / 2); }
  int later(int p, int t) const override { return p + 1 + t - first(p); }
  Row row(int p, int* scratch) const override {
    int* pair = scratch + places;
    for (int q = 0; q < p; ++q) scratch[q] = q, pair[q] = first(q) + p - q - 1;
    for (int q = p + 1; q < patches; ++q) scratch[q - 1] = q, pair[q - 1] = first(p) + q - p - 1;
    return {scratch, pair, places};
  }
};

struct Windows : Neighborhood {
  std::vector<int> candidate_, pair_, later_, first_, present_;

  Windows(int height, int width, int radius, bool wrap) : first_(1, 0) {
    patches = height * width, places = 0;
    std::vector<std::vector<int>> members(patches);
    for (int p = 0; p < patches; ++p) {
      members[p] = window(p / width, p % width, height, width, radius, wrap);
      places = std::max(places, int(members[p].size()));
      present_.push_back(int(members[p].size()));
      later_.insert(later_.end(), std::upper_bound(members[p].begin(), members[p].end(), p), members[p].end());
      first_.push_back(int(later_.size()));
    }
    pairs = int(later_.size());
    candidate_.assign(size_t(patches) * places, -1);
    pair_.assign(size_t(patches) * places, 0);
    std::vector<int> used(patches, 0);  // how many pairs of a patch are assigned to its later neighbors so far
    for (int p = 0; p < patches; ++p) {
      int own = first_[p];
      for (size_t c = 0; c < members[p].size(); ++c) {
        const int q = members[p][c];
        candidate_[size_t(p) * places + c] = q;
        pair_[size_t(p) * places + c] = q > p ? own++ : first_[q] + used[q]++;
      }
    }
  }

  // A set: on a grid smaller than the window a wrapped neighbor counts once, and a patch is never its own neighbor.
  static std::vector<int> window(int y, int x, int height, int width, int radius, bool wrap) {
    std::vector<int> found;
    for (int row : line(y, height, radius, wrap))
      for (int column : line(x, width, radius, wrap))
        if (row != y || column != x) found.push_back(row * width + column);
    return found;
  }

  static std::vector<int> line(int at, int size, int radius, bool wrap) {
    std::vector<int> near;
    for (int i = 0; i < size; ++i) {
      const int distance = std::abs(i - at);
      if ((wrap ? std::min(distance, size - distance) : distance) <= radius) near.push_back(i);
    }
    return near;
  }

  int first(int p) const override { return first_[p]; }
  int later(int, int t) const override { return later_[t]; }
  Row row(int p, int*) const override {
    return {candidate_.data() + size_t(p) * places, pair_.data() + size_t(p) * places, present_[p]};
  }
};

// Window tables cost as much as a small call, and a run uses two or three of them: keep the recent ones.
std::shared_ptr<const Neighborhood> neighborhood(int height, int width, int radius, bool wrap) {
  if (radius < 0) return std::make_shared<AllPatches>(height * width);
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, bool>, std::shared_ptr<const Neighborhood>> recent;
  const std::lock_guard<std::mutex> lock(mutex);
  if (recent.size() > 16) recent.clear();
  auto& entry = recent[{height, width, radius, wrap}];
  if (!entry) entry = std::make_shared<Windows>(height, width, radius, wrap);
  return entry;
}

// out[0] = a.a and out[1 + t] = a.b[t].
CLONES void dots(const float* __restrict a, const float* const* b, int64_t width, float* __restrict out) {
  const float *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
  float s = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t d = 0; d < width; ++d) {
    const float v = a[d];
    s += v * v;
    s0 += v * b0[d];
    s1 += v * b1[d];
    s2 += v * b2[d];
    s3 += v * b3[d];
  }
  out[0] = s, out[1] = s0, out[2] = s1, out[3] = s2, out[4] = s3;
}

// One image's pair similarities and inverse norms.
struct Similarities {
  const float* similarity;
  const float* scale;
};

// value[c] is the cosine, rank[c] what is compared: NaN below every number, missing candidates last.
inline void evaluate(const Row& row, int places, int p, Similarities m, float* __restrict value, float* __restrict rank) {
  for (int c = 0; c < places; ++c) {
    const bool present = c < row.present;
    const float cosine = m.similarity[row.pair[c]] * m.scale[p] * m.scale[present ? row.candidate[c] : 0];
    value[c] = present ? cosine : kMissing;
    rank[c] = std::isnan(value[c]) ? kNanRank : value[c];
  }
}

// A rank is the number of candidates that are better: no branches. Candidates ascend, so a tie goes to the lower c.
template <int PLACES>
__attribute__((always_inline)) inline void select_counting(
    const Neighborhood& near, int k, Similarities m, int32_t* index, float* score) {
  float value[PLACES], rank[PLACES];
  int before[PLACES], by_rank[PLACES], scratch[2 * PLACES];
  for (int p = 0; p < near.patches; ++p) {
    const Row row = near.row(p, scratch);
    evaluate(row, PLACES, p, m, value, rank);
    for (int c = 0; c < PLACES; ++c) before[c] = 0;
    for (int o = 0; o < PLACES; ++o)
      for (int c = 0; c < PLACES; ++c) before[c] += (rank[o] > rank[c]) | ((rank[o] == rank[c]) & (o < c));
    for (int c = 0; c < PLACES; ++c) by_rank[before[c]] = c;
    for (int r = 0; r < k; ++r) index[int64_t(p) * k + r] = row.candidate[by_rank[r]];
    if (score)
      for (int r = 0; r < k; ++r) score[int64_t(p) * k + r] = value[by_rank[r]];
  }
}

CLONES void select_of_8(const Neighborhood& near, int k, Similarities m, int32_t* index, float* score) {
  select_counting<8>(near, k, m, index, score);
}

CLONES void select_of_24(const Neighborhood& near, int k, Similarities m, int32_t* index, float* score) {
  select_counting<24>(near, k, m, index, score);
}

void select_sorting(const Neighborhood& near, int k, Similarities m, int32_t* index, float* score) {
  std::vector<float> value(near.places), rank(near.places);
  std::vector<int> order(near.places), scratch(2 * near.places);
  for (int p = 0; p < near.patches; ++p) {
    const Row row = near.row(p, scratch.data());
    evaluate(row, near.places, p, m, value.data(), rank.data());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + k, order.end(),
                      [&](int a, int b) { return rank[a] > rank[b] || (rank[a] == rank[b] && a < b); });
    for (int r = 0; r < k; ++r) {
      index[int64_t(p) * k + r] = row.candidate[order[r]];
      if (score) score[int64_t(p) * k + r] = value[order[r]];
    }
  }
}

void select(const Neighborhood& near, int k, Similarities m, int32_t* index, float* score) {
  const auto by_size = near.places == 8 ? select_of_8 : near.places == 24 ? select_of_24 : select_sorting;
  by_size(near, k, m, index, score);
}

// Into L2. The hardware's own prefetching stops at the end of a page, which is two or three rows.
void prefetch(const float* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(row + d, 0, 2);
}

// Similarities of every pair of one image, up to the two norms, and each patch's inverse norm.
void measure(const float* x, int64_t stride, int64_t width, const Neighborhood& near, float* similarity, float* scale) {
  float out[1 + kDotsAtOnce];
  const float* b[kDotsAtOnce];
  for (int p = 0; p < near.patches; ++p) {
    const float* a = x + p * stride;
    int t = near.first(p);
    const int end = near.first(p + 1);
    prefetch(a + kPrefetchRows * stride, width);
    do {
      const int count = std::min(kDotsAtOnce, end - t);
      for (int i = 0; i < kDotsAtOnce; ++i) b[i] = i < count ? x + near.later(p, t + i) * stride : a;
      dots(a, b, width, out);
      for (int i = 0; i < count; ++i) similarity[t + i] = out[1 + i];
      t += count;
    } while (t < end);
    const bool fits = out[0] < std::numeric_limits<float>::infinity();
    scale[p] = fits ? 1.0f / std::max(std::sqrt(out[0]), kEps) : std::numeric_limits<float>::quiet_NaN();
  }
}

std::tuple<Tensor, Tensor> neighbor_topk_fwd(
    const Tensor& x, int64_t height, int64_t width, int64_t k, int64_t radius, bool wrap, bool scores) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == height * width && x.stride(2) == 1,
                  "neighbor_topk: x must be [images, height * width, channels] with dense rows, got another layout; call the Python function.");
  const int64_t images = x.size(0), patches = x.size(1), channels = x.size(2);
  Tensor index = torch::stable::new_empty(x, {images, patches, k}, ScalarType::Int);
  Tensor score = torch::stable::new_empty(
      x, scores ? std::vector<int64_t>{images, patches, k} : std::vector<int64_t>{0}, ScalarType::Float);
  const auto shared = neighborhood(int(height), int(width), int(radius), wrap);
  const Neighborhood& near = *shared;
  STD_TORCH_CHECK(k >= 1 && k <= near.places, "neighbor_topk: k must be in 1..", near.places, ", got ", k, "; call the Python function.");
  auto* index_ptr = static_cast<int32_t*>(index.data_ptr());
  auto* score_ptr = scores ? static_cast<float*>(score.data_ptr()) : nullptr;

  with_float_type(x, "neighbor_topk", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* x_ptr = static_cast<const T*>(x.data_ptr());
    torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> similarity(std::max(near.pairs, 1)), scale(patches), widened;
      for (int64_t image = begin; image < end; ++image) {
        const T* from = x_ptr + image * x.stride(0);
        if constexpr (std::is_same_v<T, float>) {
          measure(from, x.stride(1), channels, near, similarity.data(), scale.data());
        } else {
          widened.resize(patches * channels);
          for (int64_t p = 0; p < patches; ++p) widen(from + p * x.stride(1), widened.data() + p * channels, channels);
          measure(widened.data(), channels, channels, near, similarity.data(), scale.data());
        }
        const int64_t at = image * patches * k;
        select(near, int(k), {similarity.data(), scale.data()}, index_ptr + at, scores ? score_ptr + at : nullptr);
      }
    });
  });
  return {index, score};
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(CPU, m) { m.impl("neighbor_topk_fwd", TORCH_BOX(&patchlight::neighbor_topk_fwd)); }
