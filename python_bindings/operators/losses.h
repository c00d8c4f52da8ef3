#pragma once

#include <anabranch/moe_layer.h>
#include <torch/types.h>

#include <tuple>

namespace anabranch::operators {

/// A step's losses as operators return them, see MoEOutput: what there is not is empty.
struct Losses {
  at::Tensor balance_loss;
  at::Tensor z_loss;
  at::Tensor importance_loss;
  at::Tensor load_loss;
  at::Tensor sequence_balance_loss;
  at::Tensor auxiliary_loss;

  static Losses of(const MoEOutput& found, const at::TensorOptions& options) {
    const auto of_step = [&](const at::Tensor& loss) {
      return loss.defined() ? loss : at::empty({0}, options);
    };
    return {of_step(found.balance_loss),          of_step(found.z_loss),
            of_step(found.importance_loss),       of_step(found.load_loss),
            of_step(found.sequence_balance_loss), of_step(found.auxiliary_loss)};
  }

  auto tensors() {
    return std::tie(balance_loss, z_loss, importance_loss, load_loss, sequence_balance_loss,
                    auxiliary_loss);
  }
};

}  // namespace anabranch::operators
