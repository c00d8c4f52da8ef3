#pragma once

#include <anabranch/expert_placement.h>
#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace anabranch {

/// So many of a rank's tokens for an expert are computed by another rank than the expert's owner.
struct Share {
  int64_t source;
  int64_t borrower;
  int64_t assignments;
};

/// An expert whose weights go to other ranks in a step, each of which computes a share of its tokens: of a rank's the
/// first ones go to the first borrower, and so on, and the last stay with the owner.
struct Loan {
  int64_t expert = 0;
  int64_t owner = 0;
  std::vector<int64_t> borrowers;  ///< ascending, without the owner
  std::vector<Share> shares;       ///< by (source, borrower), each once
  std::vector<int64_t> left;       ///< [W] of each rank's tokens those that the owner computes
};

/// [W] the loans that each rank borrows, ascending.
std::vector<std::vector<int64_t>> loans_by_borrower(const std::vector<Loan>& loans, int64_t ranks);

/// Seconds of what a training step is made of.
struct StepCosts {
  double assignment = 0;  ///< an expert's products of one row
  /// Of each rank whose link it takes: a row there and its result back, forward and backward.
  double row = 0;
  /// Of the owner's link, and of each borrower's: an expert's weights there and its gradients back.
  double expert = 0;
};

/// What the ranks do in a step, as far as it depends on who computes what.
struct StepForecast {
  int64_t fullest_rank = 0;  ///< assignments that it computes
  double seconds = 0;  ///< of its products, of the fullest link's rows, of weights that travel
};

/// What every rank computes and moves in a step, of which expert after expert is lent.
class Loads {
 public:
  /// `placement` of whole experts; `counts` [W, E] int64 on the host: assignments of each rank's tokens.
  Loads(const torch::Tensor& counts, const ExpertPlacement& placement);

  int64_t ranks() const { return static_cast<int64_t>(computed_.size()); }
  int64_t experts() const { return static_cast<int64_t>(owner_of_.size()); }
  int64_t owner_of(int64_t expert) const { return owner_of_[expert]; }
  /// [W] assignments
  const std::vector<int64_t>& computed() const { return computed_; }
  /// Assignments that the owner computes, of one rank's tokens and of all.
  int64_t left(int64_t source, int64_t expert) const { return left_[expert * ranks() + source]; }
  int64_t left(int64_t expert) const;

  /// Up to so many of those of a rank's tokens go to a borrower; returns how many do.
  int64_t lend(int64_t expert, const Share& share);
  /// To all ranks that have tokens for it, each with its own.
  void shadow(int64_t expert);

  StepForecast forecast(const StepCosts& costs) const;
  /// Seconds of a step that lends anything, at least.
  double least_seconds(const StepCosts& costs) const;
  /// What has been lent, by the experts' places.
  std::vector<Loan> loans() const;

 private:
  void borrow(int64_t expert, int64_t borrower);

  ExpertPlacement placement_;
  std::vector<int64_t> owner_of_;  ///< [E]
  std::vector<int64_t> left_;      ///< [E, W]
  // [W] each
  std::vector<int64_t> computed_;  ///< assignments
  std::vector<int64_t> moved_;     ///< assignments to and from others
  std::vector<int64_t> lent_;      ///< experts
  std::vector<int64_t> borrowed_;  ///< experts
  std::vector<Loan> loan_of_;      ///< [E] by expert; of no borrowers where there is none
};

}  // namespace anabranch
