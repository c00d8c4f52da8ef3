#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace anabranch {

/// What a rank holds of an expert: the whole, or one of `slices` parts of its hidden dimension.
struct HeldExpert {
  int64_t expert = 0;
  int64_t slice = 0;
  int64_t slices = 1;

  bool operator==(const HeldExpert&) const = default;
};

/// Which rank holds which experts, or slices of them. All that the ranks hold lies in places, numbered
/// through by rank: rank r has places first_place(r) .. first_place(r+1)−1. Plan, exchange and products
/// know places alone.
///
/// Without `held` experts lie in blocks, and a place is an expert: contiguous in rank order, the first
/// `num_experts % num_ranks` ranks holding one more. With more ranks than experts the last ranks hold none.
struct ExpertPlacement {
  int64_t num_experts = 0;
  int64_t num_ranks = 1;
  std::vector<std::vector<HeldExpert>> held = {};  ///< [W], or empty: blocks

  /// By its text: "blocks"; "sliced"; "movable", blocks that an ExpertMover may change; or lists rank by rank: in "0,3;2/0:2;2/1:2,1" rank 0 holds experts 0 and 3,
  /// rank 1 the first of two slices of expert 2, rank 2 the second and expert 1. InputError for other texts, and for
  /// what is no placement.
  static ExpertPlacement parse(const std::string& text, int64_t num_experts, int64_t num_ranks);
  /// With more ranks than experts each rank holds a slice of one expert, whose ranks are shared out as evenly as
  /// they go; otherwise blocks.
  static ExpertPlacement sliced(int64_t num_experts, int64_t num_ranks);

  bool is_blocks() const { return held.empty(); }
  int64_t local_experts(int64_t rank) const;
  int64_t first_place(int64_t rank) const;
  int64_t num_places() const { return first_place(num_ranks); }
  /// Which rank has that place.
  int64_t rank_of(int64_t place) const;
  HeldExpert at(int64_t rank, int64_t local) const {
    return is_blocks() ? HeldExpert{first_place(rank) + local} : held[rank][local];
  }
  /// By place.
  std::vector<HeldExpert> all() const;
  /// [E] the place of each expert, or of its first slice.
  std::vector<int64_t> place_of_experts() const;
  /// Into how many slices an expert is cut at most.
  int64_t most_slices() const;

  /// The text of it.
  std::string describe() const;
};

/// Throws InputError unless each expert is there exactly once, whole or in all its slices, of which no rank
/// holds two.
void check_placement(const ExpertPlacement& placement);
/// Throws InputError unless experts of this hidden size can be cut so, into slices of one width on each rank.
void check_slices(const ExpertPlacement& placement, int64_t expert_hidden_size);

/// How slices cut a parameter of one expert.
struct SliceCut {
  int64_t dimension =
      -1;  ///< that is cut; −1: none, the first slice has all of it and the others zeros
  int64_t parts = 1;  ///< of that dimension, cut alike: a GLU's gate and up part
  int64_t size = 0;   ///< of that dimension in the whole expert
};

}  // namespace anabranch
