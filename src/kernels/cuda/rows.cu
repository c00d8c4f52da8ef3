#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/rows.h"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSumBlocks = 4;  // of sum_rows, at once on a multiprocessor

/// `kLanes` neighbouring threads copy one row of `width` units.
template <typename unit_t, int kLanes>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const unit_t* __restrict__ rows, const int64_t* __restrict__ index,
                       int64_t count, int64_t width, unit_t* __restrict__ out) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (row >= count) {
    return;
  }
  const unit_t* source = rows + index[row] * width;
  unit_t* target = out + row * width;
  constexpr int kUnroll = 4;  // loads in flight
  int64_t i = threadIdx.x % kLanes;
  for (; i + (kUnroll - 1) * kLanes < width; i += kUnroll * kLanes) {
    unit_t unit[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      unit[j] = source[i + j * kLanes];
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      target[i + j * kLanes] = unit[j];
    }
  }
  for (; i < width; i += kLanes) {
    target[i] = source[i];
  }
}

template <typename unit_t, int kLanes>
void gather(const void* rows, const int64_t* index, int64_t count, int64_t width, void* out,
            cudaStream_t stream) {
  const unsigned blocks = grid_size(divide_up(count, kThreads / kLanes));
  gather_rows_kernel<unit_t, kLanes><<<blocks, kThreads, 0, stream>>>(
      static_cast<const unit_t*>(rows), index, count, width, static_cast<unit_t*>(out));
  check_launch("gather_rows");
}

template <typename unit_t>
void gather_units(const void* rows, const int64_t* index, int64_t count, int64_t row_bytes,
                  void* out, cudaStream_t stream) {
  const int64_t width = row_bytes / static_cast<int64_t>(sizeof(unit_t));
  if (width >= 32) {
    gather<unit_t, 32>(rows, index, count, width, out, stream);
  } else if (width >= 8) {
    gather<unit_t, 8>(rows, index, count, width, out, stream);
  } else {
    gather<unit_t, 1>(rows, index, count, width, out, stream);
  }
}

/// A warp holds a strip of one row, `kUnits` a lane, and writes it to all of the row's places; what it
/// writes is the first to leave the L2 cache.
template <typename unit_t, int kUnits>
__global__ void __launch_bounds__(kThreads)
    scatter_rows_kernel(const unit_t* __restrict__ rows, const int64_t* __restrict__ offsets,
                        const int64_t* __restrict__ members, int64_t groups, int64_t strips,
                        int64_t width, unit_t* __restrict__ out) {
  const int lane = threadIdx.x % kWarp;
  const int64_t work = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t group = work / strips;
  if (group >= groups) {
    return;
  }
  const int64_t first = (work - group * strips) * kUnits * kWarp + lane;
  unit_t units[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    if (first + j * kWarp < width) {
      units[j] = rows[group * width + first + j * kWarp];
    }
  }
  const int64_t end = offsets[group + 1];
  for (int64_t begin = offsets[group]; begin < end; begin += kWarp) {
    const int64_t member = begin + lane < end ? members[begin + lane] : 0;
    const int count = static_cast<int>(min(end - begin, int64_t{kWarp}));
    for (int i = 0; i < count; ++i) {
      unit_t* target = out + __shfl_sync(kFullMask, member, i) * width + first;
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (first + j * kWarp < width) {
          __stcs(target + j * kWarp, units[j]);
        }
      }
    }
  }
}

template <typename unit_t, int kUnits>
void scatter(const void* rows, const int64_t* offsets, const int64_t* members, int64_t groups,
             int64_t width, void* out, cudaStream_t stream) {
  const int64_t strips = divide_up(width, kUnits * kWarp);
  const unsigned blocks = grid_size(divide_up(groups * strips, kThreads / kWarp));
  scatter_rows_kernel<unit_t, kUnits>
      <<<blocks, kThreads, 0, stream>>>(static_cast<const unit_t*>(rows), offsets, members, groups,
                                        strips, width, static_cast<unit_t*>(out));
  check_launch("scatter_rows");
}

template <typename unit_t>
void scatter_units(const void* rows, const int64_t* offsets, const int64_t* members, int64_t groups,
                   int64_t row_bytes, void* out, cudaStream_t stream) {
  constexpr int kShort = 4;
  constexpr int kLong = 16;
  constexpr int64_t kEnoughWarps = 4096;  // to fill a GPU
  const int64_t width = row_bytes / static_cast<int64_t>(sizeof(unit_t));
  // Long strips leave memory longer runs to write, where a row fills them and there are enough.
  const bool long_strips = width > kShort * kWarp && groups >= kEnoughWarps;
  const auto scatter_rows = long_strips ? scatter<unit_t, kLong> : scatter<unit_t, kShort>;
  scatter_rows(rows, offsets, members, groups, width, out, stream);
}

/// Calls `body` with the largest unit of memory access that divides every row's address.
template <typename Body>
void dispatch_unit(const void* rows, const void* out, int64_t row_bytes, const Body& body) {
  const auto address = reinterpret_cast<uintptr_t>(rows) | reinterpret_cast<uintptr_t>(out) |
                       static_cast<uintptr_t>(row_bytes);
  if (address % 16 == 0) {
    body(uint4{});
  } else if (address % 8 == 0) {
    body(uint2{});
  } else if (address % 4 == 0) {
    body(uint32_t{});
  } else if (address % 2 == 0) {
    body(uint16_t{});
  } else {
    body(uint8_t{});
  }
}

template <typename scalar_t>
struct RowSum {
  const scalar_t* rows;
  const int64_t* offsets;
  const int64_t* members;
  const accumulate_t<scalar_t>* weights;  // may be null
  int64_t strips;                         // of a group
  int64_t work;                           // groups · strips
  int64_t width;
  scalar_t* out;
};

/// A range of members.
struct Range {
  int64_t begin;
  int64_t end;
};

template <typename scalar_t>
__device__ __forceinline__ Range members_of(const RowSum<scalar_t>& task, int64_t work) {
  if (work >= task.work) {
    return {0, 0};
  }
  const int64_t group = work / task.strips;
  return {task.offsets[group], task.offsets[group + 1]};
}

/// One member a lane; 0 beyond the end.
template <typename scalar_t>
__device__ __forceinline__ int64_t own_member(const RowSum<scalar_t>& task, Range range) {
  const int64_t i = range.begin + threadIdx.x % kWarp;
  return i < range.end ? task.members[i] : 0;
}

/// A warp sums strips of groups: `kPacks` · 32 packs of columns each. The strips of a group are
/// neighbours, so that rows are read through at about one time. Where the next strip's members are
/// is looked up while this one's rows arrive: otherwise three loads would wait for one another.
template <typename scalar_t, int kSize, int kPacks>
__global__ void __launch_bounds__(kThreads, kSumBlocks) sum_rows_kernel(RowSum<scalar_t> task) {
  using acc_t = accumulate_t<scalar_t>;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  int64_t work = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  Range range = members_of(task, work);
  Range next_range = members_of(task, work + step);
  int64_t member = own_member(task, range);
  for (; work < task.work; work += step) {
    const int64_t next_member = own_member(task, next_range);
    const Range after_next = members_of(task, work + 2 * step);
    const int64_t group = work / task.strips;
    const int64_t first_column = ((work - group * task.strips) * kPacks * kWarp + lane) * kSize;
    acc_t sum[kPacks][kSize] = {};
    while (range.begin < range.end) {
      const int count = static_cast<int>(min(range.end - range.begin, int64_t{kWarp}));
      const acc_t weight =
          task.weights != nullptr && lane < count ? task.weights[member] : acc_t{1};
#pragma unroll 2
      for (int j = 0; j < count; ++j) {
        const scalar_t* row =
            task.rows + __shfl_sync(kFullMask, member, j) * task.width + first_column;
        const acc_t scale = __shfl_sync(kFullMask, weight, j);
#pragma unroll
        for (int c = 0; c < kPacks; ++c) {
          if (first_column + c * kWarp * kSize < task.width) {
            acc_t values[kSize];
            unpack(load_pack<kSize>(row + c * kWarp * kSize), values);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              sum[c][i] += scale * values[i];
            }
          }
        }
      }
      range.begin += count;
      if (range.begin < range.end) {
        member = own_member(task, range);
      }
    }
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      const int64_t column = first_column + c * kWarp * kSize;
      if (column < task.width) {
        store_pack(task.out + group * task.width + column, sum[c]);
      }
    }
    range = next_range;
    member = next_member;
    next_range = after_next;
  }
}

__global__ void __launch_bounds__(kThreads)
    spoil_kernel(Spoilt numbers, const int64_t* __restrict__ spoilt) {
  if (*spoilt == 0) {
    return;
  }
  for (int tensor = 0; tensor < numbers.count; ++tensor) {
    auto* words = static_cast<uint16_t*>(numbers.tensors[tensor]);
    const auto count = numbers.bytes[tensor] / static_cast<int64_t>(sizeof(uint16_t));
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
      words[i] = 0xFFFF;
    }
  }
}

}  // namespace

void launch_gather_rows(const void* rows, const int64_t* index, int64_t count, int64_t row_bytes,
                        void* out, cudaStream_t stream) {
  if (count == 0 || row_bytes == 0) {
    return;
  }
  dispatch_unit(rows, out, row_bytes, [&](auto unit) {
    gather_units<decltype(unit)>(rows, index, count, row_bytes, out, stream);
  });
}

void launch_scatter_rows(const void* rows, const int64_t* offsets, const int64_t* members,
                         int64_t groups, int64_t row_bytes, void* out, cudaStream_t stream) {
  if (groups == 0 || row_bytes == 0) {
    return;
  }
  dispatch_unit(rows, out, row_bytes, [&](auto unit) {
    scatter_units<decltype(unit)>(rows, offsets, members, groups, row_bytes, out, stream);
  });
}

void launch_sum_rows(Scalar scalar, const void* rows, const int64_t* offsets,
                     const int64_t* members, const void* weights, int64_t groups, int64_t width,
                     void* out, cudaStream_t stream) {
  if (groups == 0 || width == 0) {
    return;
  }
  dispatch(scalar, [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    dispatch_pack<scalar_t>(aligned_rows(row_bytes, rows, out), [&](auto pack_size) {
      constexpr int kSize = decltype(pack_size)::value;
      constexpr int kPacks = 2;
      const int64_t strips = divide_up(width, kPacks * kWarp * kSize);
      const RowSum<scalar_t> task{static_cast<const scalar_t*>(rows),
                                  offsets,
                                  members,
                                  static_cast<const accumulate_t<scalar_t>*>(weights),
                                  strips,
                                  groups * strips,
                                  width,
                                  static_cast<scalar_t*>(out)};
      const int64_t blocks =
          std::min(divide_up(task.work, kThreads / kWarp), kSumBlocks * multiprocessors());
      sum_rows_kernel<scalar_t, kSize, kPacks><<<grid_size(blocks), kThreads, 0, stream>>>(task);
      check_launch("sum_rows");
    });
  });
}

void launch_spoil(const Spoilt& numbers, const int64_t* spoilt, cudaStream_t stream) {
  if (numbers.count == 0) {
    return;
  }
  spoil_kernel<<<grid_size(multiprocessors()), kThreads, 0, stream>>>(numbers, spoilt);
  check_launch("spoil");
}

}  // namespace anabranch::cuda
