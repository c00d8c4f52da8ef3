#include "kernels/cuda/device.cuh"
#include "kernels/cuda/plan/judge.h"
#include "kernels/cuda/plan/running_sums.cuh"
#include "kernels/told.h"

namespace anabranch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

/// What comes from each of `ranks` sources: rows, and assignments of each of `experts`, both `stride` numbers
/// from one source's to the next's.
struct Arriving {
  const int64_t* rows;
  const int64_t* counts;
  int64_t ranks;
  int64_t experts;
  int64_t stride;
  bool none;  ///< whether they are all taken to be 0
};

/// See ArrivalEnds. By one block.
__device__ void find_ends(const Arriving& arriving, const Ends& ends) {
  const int64_t ranks = arriving.ranks;
  const int64_t experts = arriving.experts;
  const auto count = [&](int64_t rank, int64_t expert) {
    return arriving.none ? 0 : arriving.counts[rank * arriving.stride + expert];
  };
  block_running_sums<kThreads>(
      ranks * experts, [&](int64_t i) { return count(i / experts, i % experts); }, ends.by_source);
  block_running_sums<kThreads>(
      ranks * experts, [&](int64_t i) { return count(i % ranks, i / ranks); }, ends.by_expert);
  block_running_sums<kThreads>(
      ranks,
      [&](int64_t rank) { return arriving.none ? 0 : arriving.rows[rank * arriving.stride]; },
      ends.rows);
}

/// What all ranks have told, as `rank` told it: see Told.
struct ToldBy {
  const int64_t* numbers;
  int64_t ranks;

  __device__ int64_t head(Told which) const { return numbers[which]; }
  __device__ int64_t rows_to(int64_t rank) const { return numbers[kTold + rank]; }
  __device__ int64_t assignments_of(int64_t expert) const {
    return numbers[kTold + ranks + expert];
  }
};

/// By one block; every rank's block finds the same verdict.
class Judge {
 public:
  __device__ explicit Judge(const Judging& judging) : judging_(judging) {}

  __device__ void run(int& first_refusing) const {
    if (threadIdx.x == 0) {
      first_refusing = static_cast<int>(judging_.ranks);
    }
    __syncthreads();
    for (int64_t rank = threadIdx.x; rank < judging_.ranks; rank += kThreads) {
      if (refuses(told_by(rank))) atomicMin(&first_refusing, static_cast<int>(rank));
    }
    const bool exceeded = __syncthreads_or(exceeds_a_room());
    const bool sound = !__syncthreads_or(!is_sound());
    const bool spoilt = exceeded || !sound || first_refusing < judging_.ranks;
    if (threadIdx.x == 0) {
      *judging_.spoilt = spoilt;
      tell(first_refusing, exceeded);
    }
    write_counts(spoilt);
    const ToldBy first = told_by(0);
    find_ends({first.numbers + kTold + judging_.own, own_counts(first), judging_.ranks,
               judging_.local, width(), spoilt},
              judging_.ends);
    __syncthreads();
    write_expert_counts();
  }

 private:
  __device__ int64_t width() const { return kTold + judging_.ranks + judging_.experts; }
  __device__ ToldBy told_by(int64_t rank) const {
    return {judging_.told + rank * width(), judging_.ranks};
  }
  __device__ const int64_t* own_counts(const ToldBy& told) const {
    return told.numbers + kTold + judging_.ranks + judging_.first_expert[judging_.own];
  }

  __device__ bool refuses(const ToldBy& told) const {
    return told.head(kToldNonfinite) >= 0 || told.head(kToldInvalid) >= 0 ||
           told.head(kToldForm) != told_by(0).head(kToldForm);
  }

  /// What a failed exchange has left is no count.
  __device__ bool is_sound() const {
    const int64_t numbers = width() - kToldRoomRows;
    bool sound = true;
    for (int64_t i = threadIdx.x; i < judging_.ranks * numbers; i += kThreads) {
      const int64_t number = told_by(i / numbers).numbers[kToldRoomRows + i % numbers];
      sound = sound && number >= 0 && number <= INT32_MAX;
    }
    return sound;
  }

  /// Σ of `told_by(source)`'s assignments of the experts of `rank`; by a warp.
  __device__ int64_t assignments_to(int64_t rank, int64_t first_source, int64_t end_source) const {
    const int64_t first = judging_.first_expert[rank];
    const int64_t experts = judging_.first_expert[rank + 1] - first;
    int64_t sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < (end_source - first_source) * experts; i += kWarp) {
      sum += told_by(first_source + i / experts).assignments_of(first + i % experts);
    }
    return warp_sum(sum);
  }

  __device__ bool exceeds_a_room() const {
    bool exceeds = false;
    for (int64_t rank = threadIdx.x / kWarp; rank < judging_.ranks; rank += kWarps) {
      int64_t rows = 0;
      for (int64_t source = threadIdx.x % kWarp; source < judging_.ranks; source += kWarp) {
        rows += told_by(source).rows_to(rank);
      }
      rows = warp_sum(rows);
      exceeds = exceeds || rows > told_by(rank).head(kToldRoomRows) ||
                assignments_to(rank, 0, judging_.ranks) > told_by(rank).head(kToldRoomAssignments);
    }
    return exceeds;
  }

  __device__ void tell(int first_refusing, bool exceeded) const {
    const ToldBy own = told_by(judging_.own);
    if (own.head(kToldNonfinite) >= 0) judging_.mailbox[0] = own.head(kToldNonfinite);
    if (own.head(kToldInvalid) >= 0) judging_.mailbox[1] = own.head(kToldInvalid);
    if (first_refusing < judging_.ranks) judging_.mailbox[2] = first_refusing;
    if (exceeded) judging_.mailbox[3] = 1;
  }

  /// A warp per rank.
  __device__ void write_counts(bool spoilt) const {
    const int64_t ranks = judging_.ranks;
    const int64_t own = judging_.own;
    for (int64_t rank = threadIdx.x / kWarp; rank < ranks; rank += kWarps) {
      const int64_t sent = assignments_to(rank, own, own + 1);
      const int64_t received = assignments_to(own, rank, rank + 1);
      if (threadIdx.x % kWarp != 0) {
        continue;
      }
      const auto write = [&](int64_t* counts, int64_t to, int64_t from) {
        counts[rank] = counts[2 * ranks + rank] = spoilt ? 0 : to;
        counts[ranks + rank] = spoilt ? 0 : from;
      };
      write(judging_.row_counts, told_by(own).rows_to(rank), told_by(rank).rows_to(own));
      write(judging_.assignment_counts, sent, received);
    }
  }

  /// From the ends by (expert, source). A thread per expert.
  __device__ void write_expert_counts() const {
    const auto end_of = [&](int64_t expert) {
      return expert < 0 ? 0 : judging_.ends.by_expert[(expert + 1) * judging_.ranks - 1];
    };
    const auto rows_of = [&](int64_t expert) { return end_of(expert) - end_of(expert - 1); };
    for (int64_t expert = threadIdx.x; expert <= judging_.local; expert += kThreads) {
      judging_.first_row[expert] = end_of(expert - 1);
    }
    for (int64_t expert = threadIdx.x; expert < judging_.local; expert += kThreads) {
      const int64_t rows = rows_of(expert);
      int64_t before = 0;
      for (int64_t other = 0; other < judging_.local; ++other) {
        const int64_t of_other = rows_of(other);
        before += of_other > rows || (of_other == rows && other < expert);
      }
      judging_.longest_first[before] = expert;
    }
  }

  const Judging& judging_;
};

__global__ void __launch_bounds__(kThreads) judge_kernel(Judging judging) {
  __shared__ int first_refusing;
  Judge(judging).run(first_refusing);
}

}  // namespace

void launch_judge(const Judging& judging, cudaStream_t stream) {
  judge_kernel<<<1, kThreads, 0, stream>>>(judging);
  check_launch("judge");
}

}  // namespace anabranch::cuda
