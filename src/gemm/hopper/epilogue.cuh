#pragma once

// What becomes of a warpgroup's products. A thread holds pairs of neighbouring elements of rows r
// and r + 8 of every 64 (see wgmma.cuh); through staging boxes in shared memory they become rows for
// the copy engine.
#include "gemm/hopper/ptx.cuh"
#include "gemm/hopper/shape.cuh"
#include "kernels/cuda/activation.cuh"

namespace anabranch::hopper {

using cuda::ActivationKind;

/// The part of an epilogue that all have: the warpgroup's staging boxes and their way to memory.
template <typename scalar_t, typename shape>
class Staging {
 public:
  __device__ Staging(const Problem& problem, const Maps& maps, uint32_t boxes, int barrier)
      : problem_(problem), maps_(maps), boxes_(boxes), barrier_(barrier) {}

 protected:
  __device__ static bool elected() { return threadIdx.x % kWarpgroup == 0; }
  /// This thread's first row of a box; the other is 8 rows below.
  __device__ static int own_row() {
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  }
  __device__ uint32_t box(int i) const { return boxes_ + i * kBoxBytes; }

  /// Until at most the last `kPending` groups of stores still read their boxes.
  template <int kPending>
  __device__ void wait_free() {
    if (elected()) wait_stores_read<kPending>();
    sync_threads(barrier_, kWarpgroup);
  }
  /// Until all of the warpgroup's writes can be stored.
  __device__ void finish_writes() {
    fence_shared_writes();
    sync_threads(barrier_, kWarpgroup);
  }

  /// 64 columns of products, rounded, into a box. `mask` 0: zeros.
  __device__ static void write(const float* sums, uint32_t box, uint32_t mask = 0xFFFFFFFF) {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] =
            cuda::pack_word(sums[8 * pair + 2 * w], sums[8 * pair + 2 * w + 1], scalar_t{}) & mask;
      }
      store_matrices(box + row * 128 + ((2 * pair + lane / 16) ^ (row % 8)) * 16, words);
    }
  }

  /// By the elected thread: a box at (row, column) of the tile's expert, unless it lies outside.
  __device__ void store(const CUtensorMap& map, const Group& group, int row, int column,
                        uint32_t box) const {
    if constexpr (shape::kRaggedK) {
      store_box(map, {column, row, group.expert, 0}, box);
    } else {
      store_box(map, {column, kRowsEnd - group.rows + row, group.first_row + group.rows, kRowsWrap},
                box);
    }
  }

  const Problem& problem_;
  const Maps& maps_;
  uint32_t boxes_;
  int barrier_;
};

template <typename scalar_t, typename shape>
class StoreEpilogue : Staging<scalar_t, shape> {
 public:
  using Staging<scalar_t, shape>::Staging;

  __device__ void begin(const Tile&) {}
  __device__ void finish(const Tile& tile, int first_box, const Accumulators<shape>& sums) {
    const Group group = this->problem_.group[tile.group];
    const int rows = shape::kRaggedK ? this->problem_.m : group.rows;
    // A sum of nothing is zero, and its registers hold anything.
    const uint32_t mask = shape::kRaggedK && tile.k_blocks == 0 ? 0 : 0xFFFFFFFF;
    constexpr int kStaging = shape::kStagingBoxes;
    static_assert(shape::kBBoxes % kStaging == 0);
#pragma unroll
    for (int i = 0; i < shape::kRowBoxes; ++i) {
      const int row = tile.row + (first_box + i) * kBox;
      if (row >= rows) {
        break;
      }
#pragma unroll
      for (int begin = 0; begin < shape::kBBoxes; begin += kStaging) {
        this->template wait_free<0>();
#pragma unroll
        for (int j = 0; j < kStaging; ++j) {
          this->write(&sums[i][(begin + j) * 32], this->box(j), mask);
        }
        this->finish_writes();
        if (this->elected()) {
#pragma unroll
          for (int j = 0; j < kStaging; ++j) {
            const int column = tile.column + (begin + j) * kBox;
            if (column < this->problem_.n) {
              this->store(this->maps_.c, group, row, column, this->box(j));
            }
          }
          commit_stores();
        }
      }
    }
  }
};

/// Calls `body` with the activation as a compile-time constant.
template <typename Body>
__device__ __forceinline__ void with_activation(ActivationKind kind, const Body& body) {
  switch (kind) {
    case ActivationKind::kGeluTanh:
      return body(std::integral_constant<ActivationKind, ActivationKind::kGeluTanh>{});
    case ActivationKind::kGelu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kGelu>{});
    case ActivationKind::kRelu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kRelu>{});
    case ActivationKind::kSilu:
      return body(std::integral_constant<ActivationKind, ActivationKind::kSilu>{});
  }
}

/// Activations of a warpgroup's products. They go through a staging box, so that eight lanes hold a
/// row's 64 elements and read and write whole lines of memory by themselves: warps wait for nobody.
template <typename scalar_t, typename shape>
class ActivationRows : protected Staging<scalar_t, shape> {
 public:
  using Staging<scalar_t, shape>::Staging;
  static_assert(shape::kStagingBoxes == 2 && shape::kBBoxes == 2 && shape::kRowBoxes == 2);

  __device__ void begin(const Tile&) {}

 protected:
  static constexpr int kTurns = 4;  // rows of a box that a lane has a part of

  /// Eight neighbouring elements.
  struct Eight {
    uint4 words;

    __device__ void unpack(float (&values)[8]) const {
      cuda::unpack_word(words.x, values[0], values[1], scalar_t{});
      cuda::unpack_word(words.y, values[2], values[3], scalar_t{});
      cuda::unpack_word(words.z, values[4], values[5], scalar_t{});
      cuda::unpack_word(words.w, values[6], values[7], scalar_t{});
    }
    __device__ static Eight pack(const float (&values)[8]) {
      return {{cuda::pack_word(values[0], values[1], scalar_t{}),
               cuda::pack_word(values[2], values[3], scalar_t{}),
               cuda::pack_word(values[4], values[5], scalar_t{}),
               cuda::pack_word(values[6], values[7], scalar_t{})}};
    }
  };

  __device__ static int row_of_turn(int turn) {
    return threadIdx.x % kWarpgroup / 32 * 16 + 4 * turn + threadIdx.x % 32 / 8;
  }
  __device__ static int own_column() { return threadIdx.x % 8 * 8; }

  /// What the warp has written to a box.
  __device__ static Eight read(uint32_t box, int turn) {
    const int row = row_of_turn(turn);
    Eight eight;
    load_words(box + row * 128 + (threadIdx.x % 8 ^ row % 8) * 16, eight.words);
    return eight;
  }
  __device__ static const Eight* eight_at(const void* rows, int64_t element) {
    return reinterpret_cast<const Eight*>(static_cast<const scalar_t*>(rows) + element);
  }
  __device__ static Eight* eight_at(void* rows, int64_t element) {
    return reinterpret_cast<Eight*>(static_cast<scalar_t*>(rows) + element);
  }
};

/// Stores the hidden rows and their activation, which is taken of the rounded values: the same bits
/// as in two steps.
template <typename scalar_t, typename shape>
class ActivateEpilogue : public ActivationRows<scalar_t, shape> {
  using Base = ActivationRows<scalar_t, shape>;
  using typename Base::Eight;

 public:
  using Base::Base;

  __device__ void finish(const Tile& tile, int /*first_box*/, const Accumulators<shape>& sums) {
    const Group group = this->problem_.group[tile.group];
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const int first_row = tile.row + (shape::kGlu ? step : step / 2) * kBox;
      if (first_row >= group.rows) {
        break;
      }
      __syncwarp();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {  // registers have no run-time index
        if (s != step) continue;
        if constexpr (shape::kGlu) {
          this->write(&sums[s][0], this->box(0));
          this->write(&sums[s][32], this->box(1));
        } else {
          this->write(&sums[s / 2][s % 2 * 32], this->box(0));
        }
      }
      __syncwarp();
      const int column = tile.column + (shape::kGlu ? 0 : step % 2) * kBox + this->own_column();
      if (column < this->problem_.n) {
        with_activation(this->problem_.activation, [&](auto kind) {
          activate<decltype(kind)::value>(group, first_row, column);
        });
      }
    }
  }

 private:
  static constexpr int kSteps = shape::kGlu ? 2 : 4;

  template <ActivationKind kKind>
  __device__ void activate(const Group& group, int first_row, int column) {
    const int64_t n = this->problem_.n;
#pragma unroll
    for (int turn = 0; turn < Base::kTurns; ++turn) {
      const int row = first_row + this->row_of_turn(turn);
      if (row >= group.rows) continue;
      const int64_t global_row = group.first_row + row;
      const int64_t hidden_at = global_row * (shape::kGlu ? 2 * n : n) + column;
      const Eight gate = this->read(this->box(0), turn);
      *this->eight_at(this->problem_.hidden_out, hidden_at) = gate;
      float x[8];
      gate.unpack(x);
      float up[8];
      if constexpr (shape::kGlu) {
        const Eight packed = this->read(this->box(1), turn);
        *this->eight_at(this->problem_.hidden_out, hidden_at + n) = packed;
        packed.unpack(up);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] = cuda::activate_at<kKind, true>(x[i]).value;
        if constexpr (shape::kGlu) {
          x[i] *= up[i];
        }
      }
      *this->eight_at(this->problem_.activated, global_row * n + column) = Eight::pack(x);
    }
  }
};

/// Backward of the activation: reads the hidden values, writes their gradient and the activation,
/// both scaled by the routing weights, and ⟨products, activation⟩ of each row's 64 elements.
template <typename scalar_t, typename shape>
class ActivateBackwardEpilogue : public ActivationRows<scalar_t, shape> {
  using Base = ActivationRows<scalar_t, shape>;
  using typename Base::Eight;

 public:
  using Base::Base;

  __device__ void finish(const Tile& tile, int /*first_box*/, const Accumulators<shape>& sums) {
    const Group group = this->problem_.group[tile.group];
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const int first_row = tile.row + step / 2 * kBox;
      const int column = tile.column + step % 2 * kBox + this->own_column();
      if (first_row >= group.rows) {
        break;
      }
      Inputs inputs;
      load(inputs, group, first_row, column);
      __syncwarp();
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {  // registers have no run-time index
        if (s == step) this->write(&sums[s / 2][s % 2 * 32], this->box(0));
      }
      __syncwarp();
      with_activation(this->problem_.activation, [&](auto kind) {
        differentiate<decltype(kind)::value>(inputs, group, first_row, column);
      });
    }
  }

 private:
  static constexpr int kSteps = 4;

  struct Inputs {
    Eight gate[Base::kTurns];
    Eight up[Base::kTurns];
    float weight[Base::kTurns];
  };

  __device__ bool inside(const Group& group, int row, int column) const {
    return row < group.rows && column < this->problem_.n;
  }
  __device__ int64_t hidden_at(int64_t row, int column) const {
    return row * (shape::kGlu ? 2 : 1) * this->problem_.n + column;
  }

  /// All of them before the first is used.
  __device__ void load(Inputs& inputs, const Group& group, int first_row, int column) const {
#pragma unroll
    for (int turn = 0; turn < Base::kTurns; ++turn) {
      const int row = first_row + this->row_of_turn(turn);
      if (!inside(group, row, column)) continue;
      const int64_t at = hidden_at(group.first_row + row, column);
      inputs.gate[turn] = *this->eight_at(this->problem_.hidden, at);
      if constexpr (shape::kGlu) {
        inputs.up[turn] = *this->eight_at(this->problem_.hidden, at + this->problem_.n);
      }
      inputs.weight[turn] =
          this->problem_.weights == nullptr ? 1 : this->problem_.weights[group.first_row + row];
    }
  }

  template <ActivationKind kKind>
  __device__ void differentiate(const Inputs& inputs, const Group& group, int first_row,
                                int column) const {
#pragma unroll
    for (int turn = 0; turn < Base::kTurns; ++turn) {
      const int row = first_row + this->row_of_turn(turn);
      const int64_t global_row = group.first_row + row;
      float dot = 0;
      if (inside(group, row, column)) {
        const float weight = inputs.weight[turn];
        float products[8];
        float gate[8];
        float up[8];
        this->read(this->box(0), turn).unpack(products);
        inputs.gate[turn].unpack(gate);
        if constexpr (shape::kGlu) {
          inputs.up[turn].unpack(up);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const auto [value, slope] = cuda::activate_at<kKind, true>(gate[i]);
          const float scaled = weight * products[i];
          float activated = value;
          gate[i] = scaled * slope;
          if constexpr (shape::kGlu) {
            activated *= up[i];
            gate[i] *= up[i];
            up[i] = scaled * value;
          }
          dot += products[i] * activated;
          products[i] = weight * activated;
        }
        const int64_t at = hidden_at(global_row, column);
        *this->eight_at(this->problem_.hidden_out, at) = Eight::pack(gate);
        if constexpr (shape::kGlu) {
          *this->eight_at(this->problem_.hidden_out, at + this->problem_.n) = Eight::pack(up);
        }
        *this->eight_at(this->problem_.activated, global_row * this->problem_.n + column) =
            Eight::pack(products);
      }
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        dot += __shfl_xor_sync(0xFFFFFFFF, dot, distance);
      }
      if (threadIdx.x % 8 == 0 && inside(group, row, column)) {
        const int boxes = (this->problem_.n + kBox - 1) / kBox;
        this->problem_.dots[global_row * boxes + column / kBox] = dot;
      }
    }
  }
};

template <typename scalar_t, typename shape>
using EpilogueOf = std::conditional_t<
    shape::kEpilogue == Epilogue::kStore, StoreEpilogue<scalar_t, shape>,
    std::conditional_t<shape::kEpilogue == Epilogue::kActivate, ActivateEpilogue<scalar_t, shape>,
                       ActivateBackwardEpilogue<scalar_t, shape>>>;

}  // namespace anabranch::hopper
