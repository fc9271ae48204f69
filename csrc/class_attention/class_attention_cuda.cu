// class_attention on the GPU. A group of 8, 16 or 32 lanes computes one state (or one patch) of one head; each lane has eight
// values of every row, so a product costs eight multiplications and a few shuffles, and a row of 64 16-bit values is one 16-byte
// load per lane. Kernels:
//   index_fwd, index_states_bwd   each state gathers the patches that its index names
//   all_fwd, all_states_bwd       a block computes one state, its groups divide the patches
//   inverse                       which states read each patch: a stable counting sort of the index, image by image
//   patches_bwd                   each patch sums over the states that read it
// Weights and their gradients pass from states to patches through memory (fp32, 8 bytes per state, head and neighbor). Every
// sum has a fixed order, whichever block runs first. All arithmetic is fp32.
#include <algorithm>
#include <optional>
#include <type_traits>

#include "../chunk.h"
#include "../device.h"

namespace patchlight {
namespace {

constexpr int kThreads = 128;     // at most, of a block whose groups divide rows; small blocks leave no registers unused
constexpr int kAllThreads = 224;  // of a block that computes one state: 28 groups of 8 lanes divide a 14 x 14 grid
constexpr int kInverseThreads = 256;
constexpr int kRounds = 7;        // rows that a group computes one after another: they often read the same patches, which are in L1 then
constexpr int kLaneValues = 8;    // values of a row that one lane has

// ------------------------------------------------------------------------------------------- rows, divided over a group

template <class T_, int LANES_, int UNIT_>
struct RowLayout {  // how a row is divided over a group: UNIT adjacent values per lane, then the next lane's
  using T = T_;
  static constexpr int LANES = LANES_, UNIT = UNIT_, UNITS = kLaneValues / UNIT_;
  // Neighbors whose keys and values are requested at once: 128 bytes per lane, so 4 in 16 bits, as many as SelfPatch reads.
  // One where each value needs a register of its own.
  static constexpr int AT_ONCE = UNIT == 1 ? 1 : 128 / (2 * kLaneValues * int(sizeof(T)));
  // Blocks per multiprocessor that registers allow: for a light kernel (96 per thread) and for a heavy one (128).
  static constexpr int LIGHT = UNIT > 1 ? 5 : 4, HEAVY = LIGHT - 1;
  __device__ static int lane() { return int(threadIdx.x) % LANES; }
  __device__ static int group() { return int(threadIdx.x) / LANES; }
  __device__ static int groups() { return int(blockDim.x) / LANES; }
  __device__ static int first(int unit) { return (unit * LANES + lane()) * UNIT; }
};

template <class S>
struct Packet {  // a lane's values of a row as they are in memory; zeros behind the row's end
  using T = typename S::T;
  static constexpr int kWords = S::UNIT == 1 ? kLaneValues : kLaneValues * int(sizeof(T)) / 4;
  uint32_t word[kWords];

  // `at` points to the lane's first unit; a unit behind the row's end, or of a missing row, is zeros.
  __device__ static Packet load(const char* at, int width, bool exists) {
    Packet packet{};
#pragma unroll
    for (int unit = 0; unit < S::UNITS; ++unit)
      if (exists && S::first(unit) < width) packet.load_unit(unit, at + (S::first(unit) - S::first(0)) * int(sizeof(T)));
    return packet;
  }
  __device__ void load_unit(int unit, const char* from) {
    if constexpr (S::UNIT == 1) {
      std::memcpy(&word[unit], reinterpret_cast<const T*>(from), sizeof(T));
    } else {
      const float4 loaded = *reinterpret_cast<const float4*>(from);
      std::memcpy(&word[unit * 4], &loaded, sizeof loaded);
    }
  }
  __device__ float operator[](int i) const {
    if constexpr (S::UNIT > 1 && std::is_same_v<T, BFloat16>) {  // one instruction; reading the 16 bits first would be two
      const uint32_t bits = i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    constexpr int kPerWord = S::UNIT == 1 ? 1 : 4 / int(sizeof(T));
    T value[4 / sizeof(T)];
    std::memcpy(value, &word[i / kPerWord], sizeof value);
    return float(value[i % kPerWord]);
  }
};

template <class S>
struct LaneValues {  // a lane's values of a row in fp32
  float value[kLaneValues];
  __device__ LaneValues() {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) value[i] = 0;
  }
  __device__ explicit LaneValues(const Packet<S>& packet) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) value[i] = packet[i];
  }
  __device__ void add(float weight, const Packet<S>& packet) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) value[i] += weight * packet[i];
  }
  __device__ void add(const LaneValues& other) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) value[i] += other.value[i];
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) value[i] *= factor;
  }
  // The values of the lane whose number differs in bit `distance`: the same ones of another group's row.
  __device__ LaneValues across(int distance) const {
    LaneValues other;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) other.value[i] = __shfl_xor_sync(kAllLanes, value[i], distance);
    return other;
  }
  // The product of two rows, for the whole group.
  __device__ float dot(const Packet<S>& other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) sum += value[i] * other[i];
#pragma unroll
    for (int distance = S::LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    return sum;
  }
  // Writes to row `row` of a dense tensor of rows.
  template <class Out>
  __device__ void store(Out* tensor, int64_t row, int width) const {
    Out* out = tensor + row * width;
#pragma unroll
    for (int unit = 0; unit < S::UNITS; ++unit) {
      if (S::first(unit) >= width) continue;
      Out values[S::UNIT];
#pragma unroll
      for (int i = 0; i < S::UNIT; ++i) values[i] = Out(value[unit * S::UNIT + i]);
      if constexpr (sizeof values == 16) {
        float4 packed;
        std::memcpy(&packed, values, sizeof packed);
        *reinterpret_cast<float4*>(out + S::first(unit)) = packed;
      } else {
#pragma unroll
        for (int i = 0; i < S::UNIT; ++i) out[S::first(unit) + i] = values[i];
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------- the problem

struct Problem {
  int states, patches, heads, width, slots;
  float scale;
  const int32_t* index;  // [images, states, slots], or null: every state reads all patches, slot by slot
  __device__ int64_t row(int image, int state, int head) const { return (int64_t(image) * states + state) * heads + head; }
  __device__ const int32_t* named(int image, int state) const { return index + (int64_t(image) * states + state) * slots; }
  // The patch in a slot of `named`, or -1.
  __device__ int patch(const int32_t* named, int slot) const {
    if (slot >= slots) return -1;
    const int patch = named[slot];
    return patch >= 0 && patch < patches ? patch : -1;
  }
};

template <class S>
struct HeadRows {  // the rows of one head, from this lane's first value on
  const char* x;
  int row_bytes, width;
  __device__ Packet<S> load(int row, bool exists = true) const {
    return Packet<S>::load(x + int64_t(row) * row_bytes, width, exists);
  }
};

template <class T>
struct Rows {  // x[image, row, head, :]; strides are 0 where a size of 1 stands for all
  const T* x;
  int64_t stride_image, stride_head;
  int row_bytes, width;
  template <class S>
  __device__ HeadRows<S> of(int image, int head) const {
    return {reinterpret_cast<const char*>(x + image * stride_image + head * stride_head + S::first(0)), row_bytes, width};
  }
};

template <class T>
struct Inputs {
  Rows<T> q, k_self, v_self, k_patches, v_patches;
};

template <class S>
struct HeadInputs {
  HeadRows<S> q, k_self, v_self, k_patches, v_patches;
  __device__ HeadInputs(const Inputs<typename S::T>& in, int image, int head)
      : q(in.q.template of<S>(image, head)), k_self(in.k_self.template of<S>(image, head)),
        v_self(in.v_self.template of<S>(image, head)), k_patches(in.k_patches.template of<S>(image, head)),
        v_patches(in.v_patches.template of<S>(image, head)) {}
};

struct alignas(8) Coefficient {  // the weight of a patch for a state that reads it, and the gradient of that weight
  float weight, d_weight;
};

struct Gradient {  // rows in the tensor's type, or in fp32 if they are still to be summed
  void* x;
  bool wide;
  template <class S>
  __device__ void store(const LaneValues<S>& values, int64_t row, int width) const {
    if (wide) values.store(static_cast<float*>(x), row, width);
    else values.store(static_cast<typename S::T*>(x), row, width);
  }
};

struct StateGradients {
  Gradient q, k_self, v_self;
  Coefficient* coefficients;  // [images, states, heads, slots]
  float* mean;                // [images, states, heads]: d_weight averaged with the weights
};

// The rows of a block: kRounds rows of one head per group. All groups of a warp do all rounds together, as they exchange
// values; a group whose row is behind the end computes the last row and stores nothing.
template <class S>
struct Band {
  int image, head, first, end;
  __device__ Band(int rows, int heads) {
    const int size = S::groups() * kRounds, bands = (rows + size - 1) / size;
    first = int(blockIdx.x) % bands * size;
    end = first + size < rows ? first + size : rows;
    head = int(blockIdx.x) / bands % heads;
    image = int(blockIdx.x) / bands / heads;
  }
};

// -------------------------------------------------------------------------------------------------- one state's softmax

template <class S>
struct Neighbors {  // rows of up to AT_ONCE patches; zeros where there is none
  int patch[S::AT_ONCE];
  Packet<S> key[S::AT_ONCE], value[S::AT_ONCE];
  // Those in a state's slots, from `slot` on.
  __device__ void load_named(const Problem& p, const HeadInputs<S>& in, const int32_t* named, int slot) {
#pragma unroll
    for (int t = 0; t < S::AT_ONCE; ++t) patch[t] = p.patch(named, slot + t);
    load(in);
  }
  // One patch per group, then those `groups` further on, and so on.
  __device__ void load_strided(const Problem& p, const HeadInputs<S>& in, int base) {
#pragma unroll
    for (int t = 0; t < S::AT_ONCE; ++t) {
      const int next = base + t * S::groups() + S::group();
      patch[t] = next < p.patches ? next : -1;
    }
    load(in);
  }
  __device__ void load(const HeadInputs<S>& in) {
#pragma unroll
    for (int t = 0; t < S::AT_ONCE; ++t) key[t] = in.k_patches.load(patch[t], patch[t] >= 0);
#pragma unroll
    for (int t = 0; t < S::AT_ONCE; ++t) value[t] = in.v_patches.load(patch[t], patch[t] >= 0);
  }
};

template <class S>
struct Own {  // a state's own rows
  Packet<S> q, key, value;
  __device__ Own(const HeadInputs<S>& in, int state)
      : q(in.q.load(state)), key(in.k_self.load(state)), value(in.v_self.load(state)) {}
};

__device__ __forceinline__ float exponential(float x) { return exp2f(x * kLog2e); }  // accurate enough, as x <= 0

template <class S>
struct Softmax {  // a running weighted sum of values, with weights e^(score - top) whose sum is total
  float top, total;
  LaneValues<S> sum;

  __device__ void add_patches(const Problem& p, const LaneValues<S>& q, const Neighbors<S>& neighbors) {
    float score[S::AT_ONCE], new_top = top;
#pragma unroll
    for (int t = 0; t < S::AT_ONCE; ++t) {
      const float dot = q.dot(neighbors.key[t]);
      score[t] = neighbors.patch[t] < 0 ? -INFINITY : dot * p.scale;
      new_top = fmaxf(new_top, score[t]);
    }
    rescale(new_top);
#pragma unroll
    for (int t = 0; t < S::AT_ONCE; ++t) {
      const float weight = exponential(score[t] - top);
      total += weight;
      sum.add(weight, neighbors.value[t]);
    }
  }
  __device__ void rescale(float new_top) {
    const float factor = exponential(top - new_top);
    total *= factor;
    sum.scale(factor);
    top = new_top;
  }
  __device__ void merge(Softmax other) {
    const float new_top = fmaxf(top, other.top);
    rescale(new_top);
    other.rescale(new_top);
    total += other.total;
    sum.add(other.sum);
  }
  __device__ void store(const Problem& p, typename S::T* out, float* lse, int64_t row) {
    sum.scale(1.0f / total);
    sum.store(out, row, p.width);
    if (S::lane() == 0) lse[row] = top + logf(total);
  }
};

template <class S>
struct SoftmaxBackward {  // dq = sum w (dw - mean) k in two sums, as the mean is known at the end only
  float mean;
  LaneValues<S> weighted_k, d_weighted_k;
  LaneValues<S> q, grad;
  float lse;

  __device__ float weight_of(const Problem& p, const Packet<S>& key) const { return exponential(at_most_zero(q.dot(key) * p.scale - lse)); }
  __device__ void add(const Packet<S>& key, const Coefficient& found) {
    mean += found.weight * found.d_weight;
    weighted_k.add(found.weight, key);
    d_weighted_k.add(found.weight * found.d_weight, key);
  }
  __device__ Coefficient add_patch(const Problem& p, const Neighbors<S>& neighbors, int t) {
    const float weight = weight_of(p, neighbors.key[t]);
    const Coefficient found{neighbors.patch[t] < 0 ? 0.0f : weight, grad.dot(neighbors.value[t])};
    add(neighbors.key[t], found);
    return found;
  }
  __device__ void store(const Problem& p, const StateGradients& out, int64_t row, const Coefficient& self) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) weighted_k.value[i] = (d_weighted_k.value[i] - mean * weighted_k.value[i]) * p.scale;
    out.q.store(weighted_k, row, p.width);
    q.scale(self.weight * (self.d_weight - mean) * p.scale);
    out.k_self.store(q, row, p.width);
    grad.scale(self.weight);
    out.v_self.store(grad, row, p.width);
    if (S::lane() == 0) out.mean[row] = mean;
  }
};

// -------------------------------------------------------------------------------------- states that read a few patches

// All rows that a state reads first are requested before anything is computed, so that it waits for memory once.

template <class S>
__global__ void __launch_bounds__(kThreads, S::LIGHT)
    index_fwd_kernel(Problem p, Inputs<typename S::T> inputs, typename S::T* out, float* lse) {
  const Band<S> band(p.states, p.heads);
  const HeadInputs<S> in(inputs, band.image, band.head);
  for (int base = band.first; base < band.end; base += S::groups()) {
    const bool in_band = base + S::group() < band.end;
    const int state = in_band ? base + S::group() : band.end - 1;
    const int32_t* named = p.named(band.image, state);
    const Own<S> own(in, state);
    LaneValues<S> q;
    Softmax<S> softmax;
    for (int slot = 0; slot < p.slots; slot += S::AT_ONCE) {
      Neighbors<S> neighbors;
      neighbors.load_named(p, in, named, slot);
      if (slot == 0) {
        q = LaneValues<S>(own.q);
        softmax = {q.dot(own.key) * p.scale, 1.0f, LaneValues<S>(own.value)};
      }
      softmax.add_patches(p, q, neighbors);
    }
    if (in_band) softmax.store(p, out, lse, p.row(band.image, state, band.head));
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::HEAVY)
    index_states_bwd_kernel(Problem p, Inputs<typename S::T> inputs, Rows<typename S::T> gradient, const float* lse,
                            StateGradients out) {
  const Band<S> band(p.states, p.heads);
  const HeadInputs<S> in(inputs, band.image, band.head);
  const HeadRows<S> grad = gradient.template of<S>(band.image, band.head);
  for (int base = band.first; base < band.end; base += S::groups()) {
    const bool in_band = base + S::group() < band.end;
    const int state = in_band ? base + S::group() : band.end - 1;
    const int64_t row = p.row(band.image, state, band.head);
    const int32_t* named = p.named(band.image, state);
    const Own<S> own(in, state);
    const Packet<S> upstream = grad.load(state);
    Neighbors<S> neighbors;
    neighbors.load_named(p, in, named, 0);
    SoftmaxBackward<S> softmax{0, {}, {}, LaneValues<S>(own.q), LaneValues<S>(upstream), lse[row]};
    const Coefficient self{softmax.weight_of(p, own.key), softmax.grad.dot(own.value)};
    softmax.add(own.key, self);
    for (int slot = 0; slot < p.slots; slot += S::AT_ONCE) {
      if (slot > 0) neighbors.load_named(p, in, named, slot);
#pragma unroll
      for (int t = 0; t < S::AT_ONCE; ++t) {
        const Coefficient found = softmax.add_patch(p, neighbors, t);
        if (in_band && slot + t < p.slots && S::lane() == t) out.coefficients[row * p.slots + slot + t] = found;
      }
    }
    if (in_band) softmax.store(p, out, row, self);
  }
}

// ------------------------------------------------------------------------------------- a state that reads all patches

// The state of a block.
struct BlockState {
  int image, state, head;
  __device__ explicit BlockState(const Problem& p)
      : image(int(blockIdx.x) / p.heads / p.states),
        state(int(blockIdx.x) / p.heads % p.states),
        head(int(blockIdx.x) % p.heads) {}
};

template <class S>
__global__ void __launch_bounds__(kAllThreads, 2)
    all_fwd_kernel(Problem p, Inputs<typename S::T> inputs, typename S::T* out, float* lse) {
  const BlockState at(p);
  auto* shared = reinterpret_cast<Softmax<S>*>(shared_memory());  // [warps][LANES]
  const HeadInputs<S> in(inputs, at.image, at.head);
  const Own<S> own(in, at.state);
  const LaneValues<S> q(own.q);
  // Every group starts with the own score, so that no maximum is -inf; only the first group adds its weight.
  Softmax<S> softmax{q.dot(own.key) * p.scale, 0.0f, {}};
  if (S::group() == 0) softmax.total = 1, softmax.sum = LaneValues<S>(own.value);
  for (int base = 0; base < p.patches; base += S::groups() * S::AT_ONCE) {
    Neighbors<S> neighbors;
    neighbors.load_strided(p, in, base);
    softmax.add_patches(p, q, neighbors);
  }
#pragma unroll
  for (int distance = S::LANES; distance < kWarpLanes; distance *= 2)
    softmax.merge({__shfl_xor_sync(kAllLanes, softmax.top, distance), __shfl_xor_sync(kAllLanes, softmax.total, distance),
                   softmax.sum.across(distance)});
  const int warp = int(threadIdx.x) / kWarpLanes, warps = int(blockDim.x) / kWarpLanes;
  if (int(threadIdx.x) % kWarpLanes < S::LANES) shared[warp * S::LANES + S::lane()] = softmax;
  __syncthreads();
  if (S::group() != 0) return;
  for (int other = 1; other < warps; ++other) softmax.merge(shared[other * S::LANES + S::lane()]);
  softmax.store(p, out, lse, p.row(at.image, at.state, at.head));
}

template <class S>
struct Sums {  // over the groups of a block
  float mean;
  LaneValues<S> weighted_k, d_weighted_k;
  __device__ void add(const Sums& other) {
    mean += other.mean;
    weighted_k.add(other.weighted_k);
    d_weighted_k.add(other.d_weighted_k);
  }
};

template <class S>
__global__ void __launch_bounds__(kAllThreads, 2)
    all_states_bwd_kernel(Problem p, Inputs<typename S::T> inputs, Rows<typename S::T> gradient, const float* lse,
                          StateGradients out) {
  const BlockState at(p);
  const int64_t row = p.row(at.image, at.state, at.head);
  auto* shared = reinterpret_cast<Sums<S>*>(shared_memory());  // [warps][LANES]
  const HeadInputs<S> in(inputs, at.image, at.head);
  const Own<S> own(in, at.state);
  const Packet<S> upstream = gradient.template of<S>(at.image, at.head).load(at.state);
  SoftmaxBackward<S> softmax{0, {}, {}, LaneValues<S>(own.q), LaneValues<S>(upstream), lse[row]};
  const Coefficient self{softmax.weight_of(p, own.key), softmax.grad.dot(own.value)};
  if (S::group() == 0) softmax.add(own.key, self);
  for (int base = 0; base < p.patches; base += S::groups() * S::AT_ONCE) {
    Neighbors<S> neighbors;
    neighbors.load_strided(p, in, base);
#pragma unroll
    for (int t = 0; t < S::AT_ONCE; ++t) {
      const Coefficient found = softmax.add_patch(p, neighbors, t);
      if (neighbors.patch[t] >= 0 && S::lane() == t) out.coefficients[row * p.slots + neighbors.patch[t]] = found;
    }
  }
  Sums<S> sums{softmax.mean, softmax.weighted_k, softmax.d_weighted_k};
#pragma unroll
  for (int distance = S::LANES; distance < kWarpLanes; distance *= 2)
    sums.add({__shfl_xor_sync(kAllLanes, sums.mean, distance), sums.weighted_k.across(distance), sums.d_weighted_k.across(distance)});
  const int warp = int(threadIdx.x) / kWarpLanes, warps = int(blockDim.x) / kWarpLanes;
  if (int(threadIdx.x) % kWarpLanes < S::LANES) shared[warp * S::LANES + S::lane()] = sums;
  __syncthreads();
  if (S::group() != 0) return;
  for (int other = 1; other < warps; ++other) sums.add(shared[other * S::LANES + S::lane()]);
  softmax.mean = sums.mean, softmax.weighted_k = sums.weighted_k, softmax.d_weighted_k = sums.d_weighted_k;
  softmax.store(p, out, row, self);
}

// ------------------------------------------------------------------------------------ sums over the states that read a patch

struct Inverse {  // which slots of the index hold each patch
  int32_t* slot;   // [images, states * slots]: numbers state * slots + slot, sorted by patch, then by number
  int32_t* begin;  // [images, patches + 1]: the first place of each patch
};

// A block sorts one image's index. Warps count their part of the slots, 32 at a time; of lanes with the same patch the first
// one changes the counter, so nothing is atomic and nothing depends on timing.
__global__ void __launch_bounds__(kInverseThreads) inverse_kernel(Problem p, Inverse out) {
  const int image = blockIdx.x, slots = p.states * p.slots;
  const int warps = blockDim.x / kWarpLanes, warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  int* partial = reinterpret_cast<int*>(shared_memory());     // [threads]
  int* counts = partial + blockDim.x + warp * p.patches;      // [warps][patches], this warp's
  const int steps = (slots + warps * kWarpLanes - 1) / (warps * kWarpLanes);
  const auto patch_in = [&](int step, int& slot) {
    slot = (warp * steps + step) * kWarpLanes + lane;
    return slot < slots ? p.patch(p.named(image, slot / p.slots), slot % p.slots) : -1;
  };

  for (int i = lane; i < p.patches; i += kWarpLanes) counts[i] = 0;
  __syncwarp();
  int slot;
  for (int step = 0; step < steps; ++step) {
    const int patch = patch_in(step, slot);
    const EqualLanes equal = equal_lanes(patch);
    if (patch >= 0 && equal.before == 0) counts[patch] += equal.total;
    __syncwarp();
  }
  __syncthreads();

  // Counts to places: a thread sums some adjacent patches, gets the sum of those before them, and then assigns places.
  int* all = partial + blockDim.x;
  const int each = (p.patches + int(blockDim.x) - 1) / int(blockDim.x);
  const int from = min_int(int(threadIdx.x) * each, p.patches), to = min_int(from + each, p.patches);
  int total = 0;
  for (int patch = from; patch < to; ++patch)
    for (int w = 0; w < warps; ++w) total += all[w * p.patches + patch];
  partial[threadIdx.x] = total;
  __syncthreads();
  for (int distance = 1; distance < int(blockDim.x); distance *= 2) {
    const int before = int(threadIdx.x) >= distance ? partial[threadIdx.x - distance] : 0;
    __syncthreads();
    partial[threadIdx.x] += before;
    __syncthreads();
  }
  int place = partial[threadIdx.x] - total;
  int32_t* begin = out.begin + int64_t(image) * (p.patches + 1);
  for (int patch = from; patch < to; ++patch) {
    begin[patch] = place;
    for (int w = 0; w < warps; ++w) {
      const int count = all[w * p.patches + patch];
      all[w * p.patches + patch] = place;
      place += count;
    }
  }
  if (threadIdx.x + 1 == blockDim.x) begin[p.patches] = place;
  __syncthreads();

  int32_t* ordered = out.slot + int64_t(image) * slots;
  for (int step = 0; step < steps; ++step) {
    const int patch = patch_in(step, slot);
    const EqualLanes equal = equal_lanes(patch);
    const int first = patch >= 0 ? counts[patch] : 0;
    __syncwarp();
    if (patch >= 0) ordered[first + equal.before] = slot;
    if (patch >= 0 && equal.before == 0) counts[patch] = first + equal.total;
    __syncwarp();
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::LIGHT)
    patches_bwd_kernel(Problem p, Rows<typename S::T> query, Rows<typename S::T> gradient, const Coefficient* coefficients,
                       const float* mean, Inverse inverse, typename S::T* dk, typename S::T* dv) {
  const Band<S> band(p.patches, p.heads);
  const HeadRows<S> q = query.template of<S>(band.image, band.head), grad = gradient.template of<S>(band.image, band.head);
  const int64_t first = p.row(band.image, 0, band.head);
  coefficients += first * p.slots, mean += first;
  for (int patch = band.first + S::group(); patch < band.end; patch += S::groups()) {
    const int32_t* begin = inverse.begin + int64_t(band.image) * (p.patches + 1) + patch;
    const int32_t* slots = inverse.slot + int64_t(band.image) * p.states * p.slots;
    const int from = p.index ? begin[0] : 0, to = p.index ? begin[1] : p.states;
    LaneValues<S> k, v;
#pragma unroll 2
    for (int i = from; i < to; ++i) {
      const int state = p.index ? slots[i] / p.slots : i, slot = p.index ? slots[i] % p.slots : patch;
      const Coefficient found = coefficients[int64_t(state) * (p.heads * p.slots) + slot];
      k.add(found.weight * (found.d_weight - mean[int64_t(state) * p.heads]) * p.scale, q.load(state));
      v.add(found.weight, grad.load(state));
    }
    const int64_t row = (int64_t(band.image) * p.patches + patch) * p.heads + band.head;
    k.store(dk, row, p.width);
    v.store(dv, row, p.width);
  }
}

// ------------------------------------------------------------------------------------------------------------- launch

int64_t stride_of(const Tensor& x, int dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

template <class T>
Rows<T> rows_of(const Tensor& x) {
  const int64_t row_bytes = stride_of(x, 1) * int64_t(sizeof(T));
  STD_TORCH_CHECK(row_bytes < (int64_t(1) << 31), "class_attention: rows must be less than 2^31 bytes apart, got ", row_bytes,
                  "; make the tensor contiguous.");
  return {static_cast<const T*>(x.data_ptr()), stride_of(x, 0), stride_of(x, 2), int(row_bytes), int(x.size(3))};
}

// Calls f(Type<RowLayout>{}): 16-byte loads if every row of every tensor starts and ends at multiples of 16 bytes.
template <class T, class F>
void with_row_layout(std::initializer_list<const Tensor*> tensors, int width, F f) {
  constexpr int kUnit = kUnitBytes / int(sizeof(T));
  bool aligned = width % kUnit == 0;
  for (const Tensor* x : tensors) {
    const auto* data = static_cast<const T*>(x->data_ptr());
    aligned = aligned && rows_aligned(data, {stride_of(*x, 0), stride_of(*x, 1), stride_of(*x, 2)});
  }
  if (aligned && width <= 8 * kLaneValues) f(Type<RowLayout<T, 8, kUnit>>{});
  else if (aligned && width <= 16 * kLaneValues) f(Type<RowLayout<T, 16, kUnit>>{});
  else f(Type<RowLayout<T, 32, 1>>{});
}

Problem problem_of(
    const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches, const std::optional<Tensor>& index) {
  for (const Tensor* x : {&q, &k_self, &v_self, &k_patches})
    STD_TORCH_CHECK(x->dim() == 4 && (x->size(3) == 1 || x->stride(3) == 1) && x->size(3) <= 32 * kLaneValues,
                    "class_attention: arguments must be [images, rows, heads, width <= 256] with dense rows, got another layout; call the Python function.");
  const int64_t states = index ? index->size(1) : std::max({q.size(1), k_self.size(1), v_self.size(1)});
  const int64_t patches = k_patches.size(1), width = k_patches.size(3);
  return {int(states), int(patches), int(k_patches.size(2)), int(width), int(index ? index->size(2) : patches),
          1.0f / std::sqrt(float(width)), index ? static_cast<const int32_t*>(index->data_ptr()) : nullptr};
}

template <class T>
Inputs<T> inputs_of(
    const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches, const Tensor& v_patches) {
  return {rows_of<T>(q), rows_of<T>(k_self), rows_of<T>(v_self), rows_of<T>(k_patches), rows_of<T>(v_patches)};
}

dim3 blocks_of(int64_t count) {
  STD_TORCH_CHECK(count < (int64_t(1) << 31), "class_attention: one launch must have less than 2^31 blocks, got ", count, "; split the batch.");
  return {unsigned(count), 1, 1};
}

// Warps per block: the most for which at most an eighth of the groups is idle over all rounds.
template <class S>
int warps_for(int rows) {
  for (int warps = kThreads / kWarpLanes; warps > 1; --warps) {
    const int groups = warps * (kWarpLanes / S::LANES), idle = (groups - rows % groups) % groups;
    if (idle * 8 <= rows) return warps;
  }
  return 1;
}

// Launches a kernel whose blocks are bands of the rows of every image and head.
template <class S, class... Params, class... Args>
void launch_bands(const OnDevice& device, void (*kernel)(Params...), int64_t images, int heads, int rows, Args... args) {
  const int threads = warps_for<S>(rows) * kWarpLanes, size = threads / S::LANES * kRounds;
  launch(device, kernel, blocks_of(images * heads * ((rows + size - 1) / size)), threads, 0, args...);
}

// Launches a kernel whose blocks compute one state each; its groups' results are a `Partial` per lane of a group and warp.
template <class S, class Partial, class... Params, class... Args>
void launch_states(const OnDevice& device, void (*kernel)(Params...), int64_t images, const Problem& p, Args... args) {
  const int warps = std::min(kAllThreads / kWarpLanes, (p.patches * S::LANES + kWarpLanes - 1) / kWarpLanes);
  const size_t shared = warps * S::LANES * sizeof(Partial);
  launch(device, kernel, blocks_of(images * p.states * p.heads), warps * kWarpLanes, shared, p, args...);
}

void launch_inverse(const OnDevice& device, const Problem& p, int64_t images, const Inverse& out) {
  const auto shared = [&](int warps) { return (size_t(warps) * p.patches + size_t(warps) * kWarpLanes) * sizeof(int); };
  const int64_t slots = int64_t(p.states) * p.slots;
  int warps = int(std::min<int64_t>(kInverseThreads / kWarpLanes, (slots + kWarpLanes - 1) / kWarpLanes));
  while (warps > 1 && shared(warps) > 48 * 1024) --warps;
  STD_TORCH_CHECK(shared(warps) <= device.shared_memory_limit(), "class_attention: the backward counts readers of ", p.patches,
                  " patches in shared memory, and this GPU has too little of it; use force(class_attention='triton').");
  launch(device, inverse_kernel, blocks_of(images), warps * kWarpLanes, shared(warps), p, out);
}

std::tuple<Tensor, Tensor> class_attention_fwd(
    const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches, const Tensor& v_patches,
    const std::optional<Tensor>& index) {
  const Problem p = problem_of(q, k_self, v_self, k_patches, index);
  const int64_t images = k_patches.size(0);
  Tensor out = torch::stable::new_empty(q, {images, p.states, p.heads, p.width});
  Tensor lse = torch::stable::new_empty(q, {images, p.states, p.heads}, ScalarType::Float);
  const OnDevice device(q);
  with_float_type(q, "class_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    with_row_layout<T>({&q, &k_self, &v_self, &k_patches, &v_patches}, p.width, [&](auto layout) {
      using S = typename decltype(layout)::type;
      const Inputs<T> in = inputs_of<T>(q, k_self, v_self, k_patches, v_patches);
      auto* out_ptr = static_cast<T*>(out.data_ptr());
      auto* lse_ptr = static_cast<float*>(lse.data_ptr());
      if (index) launch_bands<S>(device, index_fwd_kernel<S>, images, p.heads, p.states, p, in, out_ptr, lse_ptr);
      else launch_states<S, Softmax<S>>(device, all_fwd_kernel<S>, images, p, in, out_ptr, lse_ptr);
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> class_attention_bwd(
    const Tensor& grad, const Tensor& q, const Tensor& k_self, const Tensor& v_self, const Tensor& k_patches,
    const Tensor& v_patches, const std::optional<Tensor>& index, const Tensor& lse) {
  using torch::stable::new_empty;
  const Problem p = problem_of(q, k_self, v_self, k_patches, index);
  const int64_t images = k_patches.size(0), states = p.states, heads = p.heads;
  const auto own_gradient = [&](const Tensor& x) {  // a row per state, in fp32 if states share a row and it is still to be summed
    const bool shared = x.size(0) != images || x.size(1) != states;
    return new_empty(x, {images, states, heads, p.width}, shared ? std::optional(ScalarType::Float) : std::nullopt);
  };
  Tensor dq = own_gradient(q), dk_self = own_gradient(k_self), dv_self = own_gradient(v_self);
  Tensor dk = new_empty(q, {images, p.patches, heads, p.width}), dv = new_empty(q, {images, p.patches, heads, p.width});
  Tensor coefficients = new_empty(lse, {images, states, heads, p.slots, 2}), mean = new_empty(lse, {images, states, heads});
  Tensor slot = new_empty(q, {index ? images * states * p.slots : 0}, ScalarType::Int);
  Tensor begin = new_empty(q, {index ? images * (p.patches + 1) : 0}, ScalarType::Int);
  const Inverse inverse{static_cast<int32_t*>(slot.data_ptr()), static_cast<int32_t*>(begin.data_ptr())};
  const auto target = [](Tensor& x, const Tensor& of) { return Gradient{x.data_ptr(), x.scalar_type() != of.scalar_type()}; };
  const StateGradients own{target(dq, q), target(dk_self, q), target(dv_self, q),
                           static_cast<Coefficient*>(coefficients.data_ptr()), static_cast<float*>(mean.data_ptr())};
  const auto* lse_ptr = static_cast<const float*>(lse.data_ptr());
  const OnDevice device(q);
  if (index) launch_inverse(device, p, images, inverse);
  with_float_type(q, "class_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    with_row_layout<T>({&grad, &q, &k_self, &v_self, &k_patches, &v_patches}, p.width, [&](auto layout) {
      using S = typename decltype(layout)::type;
      const Inputs<T> in = inputs_of<T>(q, k_self, v_self, k_patches, v_patches);
      const Rows<T> upstream = rows_of<T>(grad);
      if (index) launch_bands<S>(device, index_states_bwd_kernel<S>, images, p.heads, p.states, p, in, upstream, lse_ptr, own);
      else launch_states<S, Sums<S>>(device, all_states_bwd_kernel<S>, images, p, in, upstream, lse_ptr, own);
      launch_bands<S>(device, patches_bwd_kernel<S>, images, p.heads, p.patches, p, in.q, upstream,
                      static_cast<const Coefficient*>(own.coefficients), static_cast<const float*>(own.mean), inverse,
                      static_cast<T*>(dk.data_ptr()), static_cast<T*>(dv.data_ptr()));
    });
  });
  return {dq, dk_self, dv_self, dk, dv};
}

}  // namespace
}  // namespace patchlight

PATCHLIGHT_IMPL(PATCHLIGHT_GPU, m) {
  m.impl("class_attention_fwd", TORCH_BOX(&patchlight::class_attention_fwd));
  m.impl("class_attention_bwd", TORCH_BOX(&patchlight::class_attention_bwd));
}
