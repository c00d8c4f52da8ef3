#pragma once

// What becomes of a warpgroup's products. A thread holds pairs of neighbouring elements of rows r
// and r + 8 of every 64 (see wgmma.cuh); through staging boxes in shared memory they become rows for
// TMA.
#include "gemm/hopper/ptx.cuh"
#include "gemm/hopper/shape.cuh"
#include "gemm/tiles/activation.cuh"

namespace anabranch::hopper {

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

  __device__ void begin(const Tile&, int) {}
  __device__ void finish(const Tile& tile, int first_box, const Accumulators<shape>& sums) {
    const Group& group = tile.group;
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

/// Adds the products to fp32 sums in memory: [experts, m, n].
template <typename scalar_t, typename shape>
class AccumulateEpilogue : Staging<scalar_t, shape> {
 public:
  using Staging<scalar_t, shape>::Staging;
  static_assert(shape::kRaggedK);

  __device__ void begin(const Tile&, int) {}
  __device__ void finish(const Tile& tile, int first_box, const Accumulators<shape>& sums) {
    if (tile.k_blocks == 0) {
      return;  // the registers hold anything
    }
    const int64_t expert = tile.group.expert;
    const int first_column = tile.column + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < shape::kRowBoxes; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile.row + (first_box + i) * kBox + this->own_row() + 8 * half;
        if (row < this->problem_.m) {
          add_row(this->problem_.sum + (expert * this->problem_.m + row) * this->problem_.n,
                  first_column, sums[i], half);
        }
      }
    }
  }

 private:
  static constexpr int kLoads = 8;  // in flight

  /// Pairs of neighbouring columns, 8 apart.
  __device__ void add_row(float* row, int first_column, const float (&sums)[shape::kColumns / 2],
                          int half) const {
#pragma unroll
    for (int begin = 0; begin < shape::kColumns / 8; begin += kLoads) {
      float2 pairs[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int column = first_column + (begin + j) * 8;
        if (column < this->problem_.n) pairs[j] = *reinterpret_cast<const float2*>(row + column);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int column = first_column + (begin + j) * 8;
        pairs[j].x += sums[4 * (begin + j) + 2 * half];
        pairs[j].y += sums[4 * (begin + j) + 2 * half + 1];
        if (column < this->problem_.n) *reinterpret_cast<float2*>(row + column) = pairs[j];
      }
    }
  }
};

/// Activations of a warpgroup's products, 64 x 64 elements a step. They go through a staging box, so
/// that eight lanes hold a row's 64 elements and write whole lines of memory by themselves: warps wait
/// for nobody. Loops are not unrolled: instructions that run once a tile would be fetched from afar.
template <typename scalar_t, typename shape>
class ActivationSteps : protected Staging<scalar_t, shape> {
 public:
  using Staging<scalar_t, shape>::Staging;

 protected:
  // A warpgroup's part of a tile: boxes of one step each, row by row of them.
  static constexpr int kAcross = shape::kTileColumns / kBox;
  static constexpr int kSteps = shape::kRowBoxes * kAcross;
  using Eight = tiles::Eight<scalar_t>;
  static constexpr int kTurns = 4;  // a lane has a part of this many rows of a box, 4 rows apart
  static constexpr int kTurnRows = 4;

  /// This lane's row of a box in the first turn, and its first column.
  __device__ static int own_row() {
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 8;
  }
  __device__ static int own_column() { return threadIdx.x % 8 * 8; }
  /// The first row of a step's box, and this lane's first column in it.
  __device__ static int row_of(const Tile& tile, int first_box, int step) {
    return tile.row + (first_box + step / kAcross) * kBox;
  }
  __device__ static int column_of(const Tile& tile, int step) {
    return tile.column + step % kAcross * kBox + own_column();
  }

  /// Where a lane's elements of a box row lie.
  __device__ static uint32_t place(uint32_t box, int row) {
    return box + row * 128 + (threadIdx.x % 8 ^ row % 8) * 16;
  }
  __device__ static Eight read(uint32_t box, int row) {
    Eight eight;
    load_words(place(box, row), eight.words);
    return eight;
  }
  __device__ static Eight* eights_at(void* rows, int64_t element) {
    return reinterpret_cast<Eight*>(static_cast<scalar_t*>(rows) + element);
  }

  __device__ int64_t hidden_width() const {
    return static_cast<int64_t>(shape::kGlu ? 2 : 1) * this->problem_.n;
  }
};

/// Stores the hidden rows and their activation, which is taken of the rounded values: the same bits
/// as in two steps.
template <typename scalar_t, typename shape>
class ActivateEpilogue : public ActivationSteps<scalar_t, shape> {
  using Base = ActivationSteps<scalar_t, shape>;
  using typename Base::Eight;

 public:
  using Base::Base;
  static_assert(shape::kStagingBoxes == 2);

  __device__ void begin(const Tile&, int) {}
  __device__ void finish(const Tile& tile, int first_box, const Accumulators<shape>& sums) {
    const Group& group = tile.group;
#pragma unroll 1
    for (int step = 0; step < Base::kSteps; ++step) {
      const int first_row = this->row_of(tile, first_box, step);
      if (first_row >= group.rows) {
        break;
      }
      __syncwarp();
#pragma unroll
      for (int s = 0; s < Base::kSteps; ++s) {  // registers have no run-time index
        if (s != step) continue;
        const float* box_sums = &sums[s / Base::kAcross][s % Base::kAcross * 32];
        this->write(box_sums, this->box(0));
        if constexpr (shape::kGlu) {
          this->write(box_sums + Base::kAcross * 32, this->box(1));
        }
      }
      __syncwarp();
      const int column = this->column_of(tile, step);
      if (column < this->problem_.n) {
        with_activation(this->problem_.activation, [&](auto kind) {
          activate<decltype(kind)::value>(group, first_row, column);
        });
      }
    }
  }

 private:
  template <ActivationKind kKind>
  __device__ void activate(const Group& group, int first_row, int column) {
    const int64_t n = this->problem_.n;
    int row = this->own_row();
    const int64_t global_row = group.first_row + first_row + row;
    Eight* hidden =
        this->eights_at(this->problem_.hidden_out, global_row * this->hidden_width() + column);
    Eight* activated = this->eights_at(this->problem_.activated, global_row * n + column);
#pragma unroll 1
    for (int turn = 0; turn < Base::kTurns && first_row + row < group.rows; ++turn) {
      const Eight gate = this->read(this->box(0), row);
      *hidden = gate;
      float x[8];
      gate.unpack(x);
      float up[8];
      if constexpr (shape::kGlu) {
        const Eight packed = this->read(this->box(1), row);
        hidden[n / 8] = packed;
        packed.unpack(up);
      }
      activate_eight<kKind, shape::kGlu>(x, up);
      *activated = Eight::pack(x);
      row += Base::kTurnRows;
      hidden += Base::kTurnRows * this->hidden_width() / 8;
      activated += Base::kTurnRows * n / 8;
    }
  }
};

/// Backward of the activation: reads the hidden values, writes their gradient and the activation,
/// both scaled by the routing weights, and ⟨products, activation⟩ of each row's 64 elements. The
/// products take the first staging box; hidden values arrive in the others a step ahead.
template <typename scalar_t, typename shape>
class ActivateBackwardEpilogue : public ActivationSteps<scalar_t, shape> {
  using Base = ActivationSteps<scalar_t, shape>;
  using typename Base::Eight;

 public:
  using Base::Base;

  __device__ void begin(const Tile& tile, int first_box) {
    const Group& group = tile.group;
    wait_copies<0>();  // of a last step that lay outside
    __syncwarp();
    request(tile, first_box, group, 0);
#pragma unroll
    for (int i = 0; i < shape::kRowBoxes; ++i) {
      const int row = tile.row + (first_box + i) * kBox + weight_row();
      weights_[i] = this->problem_.weights != nullptr && row < group.rows
                        ? this->problem_.weights[group.first_row + row]
                        : 1.0f;
    }
  }

  __device__ void finish(const Tile& tile, int first_box, const Accumulators<shape>& sums) {
    const Group& group = tile.group;
#pragma unroll 1
    for (int step = 0; step < Base::kSteps; ++step) {
      const int first_row = this->row_of(tile, first_box, step);
      if (first_row >= group.rows) {
        break;
      }
      __syncwarp();  // everyone has read what is written now
      if (step + 1 < Base::kSteps) {
        request(tile, first_box, group, step + 1);
      }
#pragma unroll
      for (int s = 0; s < Base::kSteps; ++s) {  // registers have no run-time index
        if (s == step) this->write(&sums[s / Base::kAcross][s % Base::kAcross * 32], this->box(0));
      }
      if (step + 1 < Base::kSteps) {
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncwarp();
      const int column = this->column_of(tile, step);
      const float weight = step < Base::kAcross ? weights_[0] : weights_[shape::kRowBoxes - 1];
      with_activation(this->problem_.activation, [&](auto kind) {
        differentiate<decltype(kind)::value>(hidden_box(step), weight, group, first_row, column);
      });
    }
  }

 private:
  static constexpr int kParts = shape::kGlu ? 2 : 1;
  static_assert(shape::kStagingBoxes == 1 + 2 * kParts);

  __device__ uint32_t hidden_box(int step) const { return this->box(1 + step % 2 * kParts); }

  /// The row of a box whose weight this lane keeps for its warp.
  __device__ static int weight_row() {
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 16;
  }

  /// Asks for a step's hidden values; rows and columns outside become zero.
  __device__ void request(const Tile& tile, int first_box, const Group& group, int step) const {
    const int column = this->column_of(tile, step);
    int row = this->own_row();
    const int first_row = this->row_of(tile, first_box, step);
    const scalar_t* hidden =
        static_cast<const scalar_t*>(this->problem_.hidden) +
        static_cast<int64_t>(group.first_row + first_row + row) * this->hidden_width() + column;
#pragma unroll
    for (int turn = 0; turn < Base::kTurns; ++turn) {
      const bool inside = first_row + row < group.rows && column < this->problem_.n;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        copy_16(this->place(hidden_box(step) + part * kBoxBytes, row),
                inside ? hidden + part * this->problem_.n : this->problem_.hidden, inside);
      }
      row += Base::kTurnRows;
      hidden += Base::kTurnRows * this->hidden_width();
    }
    commit_copies();
  }

  template <ActivationKind kKind>
  __device__ void differentiate(uint32_t hidden, float weights, const Group& group, int first_row,
                                int column) const {
    const int64_t n = this->problem_.n;
    int row = this->own_row();
    int64_t global_row = group.first_row + first_row + row;
    Eight* dhidden =
        this->eights_at(this->problem_.hidden_out, global_row * this->hidden_width() + column);
    Eight* activated = this->eights_at(this->problem_.activated, global_row * n + column);
#pragma unroll 1
    for (int turn = 0; turn < Base::kTurns; ++turn) {
      const float weight = __shfl_sync(0xFFFFFFFF, weights, row % 16);
      const bool inside = first_row + row < group.rows && column < n;
      float products[8];
      float gate[8];
      float up[8];
      this->read(this->box(0), row).unpack(products);
      this->read(hidden, row).unpack(gate);
      if constexpr (shape::kGlu) {
        this->read(hidden + kBoxBytes, row).unpack(up);
      }
      float dot = differentiate_eight<kKind, shape::kGlu>(gate, up, products, weight);
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        dot += __shfl_xor_sync(0xFFFFFFFF, dot, distance);
      }
      if (inside) {
        *dhidden = Eight::pack(gate);
        if constexpr (shape::kGlu) {
          dhidden[n / 8] = Eight::pack(up);
        }
        *activated = Eight::pack(products);
        if (threadIdx.x % 8 == 0) {
          this->problem_.dots[global_row * ((n + kBox - 1) / kBox) + column / kBox] = dot;
        }
      }
      row += Base::kTurnRows;
      global_row += Base::kTurnRows;
      dhidden += Base::kTurnRows * this->hidden_width() / 8;
      activated += Base::kTurnRows * n / 8;
    }
  }

  float weights_[shape::kRowBoxes];  // of row weight_row() in each box of rows
};

template <typename scalar_t, typename shape>
using EpilogueOf = std::conditional_t<
    shape::kEpilogue == Epilogue::kStore, StoreEpilogue<scalar_t, shape>,
    std::conditional_t<shape::kEpilogue == Epilogue::kAccumulate,
                       AccumulateEpilogue<scalar_t, shape>,
                       std::conditional_t<shape::kEpilogue == Epilogue::kActivate,
                                          ActivateEpilogue<scalar_t, shape>,
                                          ActivateBackwardEpilogue<scalar_t, shape>>>>;

}  // namespace anabranch::hopper
