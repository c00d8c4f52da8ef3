#pragma once

#include <anabranch/expert_placement.h>
#include <anabranch/options.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string_view>
#include <vector>

namespace anabranch {

/// A projection of several experts, or its gradient; the bias may be undefined.
struct Projection {
  torch::Tensor weight;  ///< [experts, out, in]
  torch::Tensor bias;    ///< [experts, out]
};

/// What experts compute with, or its gradients: down(activation(up(x))).
struct ExpertProjections {
  Projection up;    ///< out: n, or 2n (gate, then up) for a GLU
  Projection down;  ///< in: n
};

/// Sums of the weights' gradients, each undefined where there is none.
struct WeightSums {
  torch::Tensor up;    ///< as the up-projection's weight
  torch::Tensor down;  ///< as the down-projection's
};

/// The parameters of the experts that live on this rank. Biases are undefined without
/// `options.bias`. With `glu`, rows 0..n−1 of an up-projection are the gate, n..2n−1 the up part. Of slices n is
/// the width; the first has the down-projection's bias, the others zeros.
class ExpertsImpl : public torch::nn::Module {
 public:
  /// `sharded` false: a shared expert, which every rank holds whole (`placement` of 1 rank).
  ExpertsImpl(const MoEOptions& options, const ExpertPlacement& placement, int64_t rank,
              bool sharded = true);

  /// As of any module; sums in `main_grad` move along, in fp32 (fp64 with fp64).
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  /// Number of this rank's first place: of its first expert, where experts lie in blocks.
  int64_t first_place() const { return first_place_; }
  /// Null: blocks, over however many ranks. It becomes what `place` says, for all who have it.
  std::shared_ptr<const ExpertPlacement> placement() const { return placement_; }
  /// See MoELayer.
  void place(const ExpertPlacement& placement);
  /// How slices cut the parameter of that name.
  SliceCut cut_of(std::string_view name) const;
  /// Experts over all ranks.
  int64_t num_experts() const { return num_experts_; }
  /// Spread over the expert-parallel group, in however many ranks; otherwise replicated.
  bool sharded() const { return sharded_; }
  ExpertProjections projections() const { return {{up_weight, up_bias}, {down_weight, down_bias}}; }

  torch::Tensor up_weight;    ///< [local_experts, n or 2n, h]
  torch::Tensor up_bias;      ///< [local_experts, n or 2n]
  torch::Tensor down_weight;  ///< [local_experts, h, n]
  torch::Tensor down_bias;    ///< [local_experts, h]

  /// Sums in fp32 (fp64) of the weights' shapes that backward adds their gradients to, unrounded; the
  /// weights then get no grad(). For weights of 16 bits and many steps' gradients. Undefined: grad().
  WeightSums main_grad;

 private:
  void add(const MoEOptions& options, const std::vector<HeldExpert>& held);
  /// To where the weights are.
  void move_main_grad(bool non_blocking);

  int64_t first_place_ = 0;
  int64_t num_experts_;
  bool sharded_;
  std::shared_ptr<ExpertPlacement> placement_;
  bool glu_;
  int64_t whole_width_;  ///< n, of a whole expert
};
TORCH_MODULE(Experts);

}  // namespace anabranch
