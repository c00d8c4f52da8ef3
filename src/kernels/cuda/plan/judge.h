#pragma once

#include "kernels/cuda/launch.h"

// The launcher of judge.cu: see launch.h.

namespace anabranch::cuda {

/// See ArrivalEnds.
struct Ends {
  int64_t* by_source;
  int64_t* by_expert;
  int64_t* rows;
};

/// See PlanKernels::judge.
struct Judging {
  const int64_t* told;          ///< [ranks, kTold + ranks + experts]
  const int64_t* first_expert;  ///< [ranks + 1]
  int64_t ranks;
  int64_t experts;
  int64_t own;    ///< this rank
  int64_t local;  ///< its experts
  // Results.
  int64_t* spoilt;
  int64_t* row_counts;         ///< [3, ranks]
  int64_t* assignment_counts;  ///< [3, ranks]
  int64_t* first_row;          ///< [local + 1]
  int64_t* longest_first;      ///< [local]
  Ends ends;
  int64_t* mailbox;  ///< [4] in memory that the host sees
};
void launch_judge(const Judging& judging, cudaStream_t stream);

}  // namespace anabranch::cuda
