#pragma once

#include <anabranch/moe_layer.h>
#include <torch/types.h>

#include <tuple>
#include <utility>

namespace anabranch::operators {

template <size_t... each>
auto tensors_of(std::index_sequence<each...> /*numbers*/)
    -> std::tuple<std::conditional_t<true, at::Tensor, std::integral_constant<size_t, each>>...>;
/// So many tensors, as an operator returns them.
template <size_t count>
using TensorTuple = decltype(tensors_of(std::make_index_sequence<count>()));

/// A step's losses as operators return them, see MoEOutput: what there is not is empty.
struct Losses {
  at::Tensor balance_loss;
  at::Tensor z_loss;
  at::Tensor importance_loss;
  at::Tensor load_loss;
  at::Tensor sequence_balance_loss;
  at::Tensor auxiliary_loss;
  at::Tensor mean_probabilities;

  static Losses of(const MoEOutput& found, const at::TensorOptions& options) {
    const auto of_step = [&](const at::Tensor& loss) {
      return loss.defined() ? loss : at::empty({0}, options);
    };
    return {of_step(found.balance_loss),          of_step(found.z_loss),
            of_step(found.importance_loss),       of_step(found.load_loss),
            of_step(found.sequence_balance_loss), of_step(found.auxiliary_loss),
            of_step(found.mean_probabilities)};
  }

  auto tensors() {
    return std::tie(balance_loss, z_loss, importance_loss, load_loss, sequence_balance_loss,
                    auxiliary_loss, mean_probabilities);
  }
};

/// Routing::bias_histogram as operators return it: empty where there is none.
inline at::Tensor histogram_of(const MoEOutput& found, const at::TensorOptions& options) {
  return found.bias_histogram.defined() ? found.bias_histogram
                                        : at::empty({0}, options.dtype(at::kLong));
}

}  // namespace anabranch::operators
