#include "experts_in_rounds.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <anabranch/communicator.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "exchange/moving.h"
#include "experts/permute.h"
#include "kernels/rows.h"
#include "support/given.h"
#include "support/single_backward.h"
#include "support/stage.h"
#include "support/tensor_list.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What forward leaves for backward besides tensors.
struct StepInRounds : torch::CustomClassHolder {
  StepInRounds(const Exchange& exchange, Rounds rounds, FeedForward expert, WeightSums main_grad)
      : exchange(exchange),
        rounds(std::move(rounds)),
        expert(std::move(expert)),
        main_grad(std::move(main_grad)) {}

  Exchange exchange;
  Rounds rounds;
  FeedForward expert;
  WeightSums main_grad;

  /// [R, h] of a round.
  torch::Tensor dispatch(const torch::Tensor& rows, const ExchangePlan& round) const {
    Dispatching dispatching(exchange.communicator(), {rows, {}}, round, Travel::kInTurn);
    dispatching.wait_for_next();
    return dispatching.received().rows;
  }
};

/// What comes back in one round after another.
class Returned {
 public:
  Returned(const StepInRounds& step, at::TensorOptions options, int64_t width)
      : step_(step),
        rows_(at::empty({step.rounds.rows_of_tokens.members.size(0), width}, options)) {}

  /// `results` of this round at the experts; returns the values by (expert, token). Collective.
  torch::Tensor combine(const Payload& results, const ExchangePlan& round) {
    const int64_t count = round.send_tokens.size(0);
    Combining combining(step_.exchange.communicator(), round, Travel::kInTurn,
                        rows_.narrow(0, next_, count));
    next_ += count;
    combining.send(results);
    return combining.finish_unsummed().values;
  }
  /// [T, h], after the last round.
  torch::Tensor sum_of_tokens() const {
    return RowKernels::on(rows_.device()).sum_rows(rows_, step_.rounds.rows_of_tokens, {});
  }

 private:
  const StepInRounds& step_;
  torch::Tensor rows_;  ///< [S, h] by round
  int64_t next_ = 0;
};

/// The gradients of the experts' parameters, added up over the rounds.
class GradientSums {
 public:
  GradientSums(const ExpertProjections& experts, const WantedGradients& wanted)
      : experts_(experts), wanted_(wanted) {
    up_ = add_sum(experts.up.weight, wanted.up_weight, wanted_.sums.up);
    down_ = add_sum(experts.down.weight, wanted.down_weight, wanted_.sums.down);
  }

  /// With sums, to which the weights' gradients are added.
  const WantedGradients& wanted() const { return wanted_; }
  void add_biases(const ExpertProjections& gradients) {
    add(up_bias_, gradients.up.bias);
    add(down_bias_, gradients.down.bias);
  }
  /// In the parameters' types; weights undefined where the caller has sums of its own.
  ExpertProjections gradients() const {
    const auto rounded = [](const torch::Tensor& sum, const torch::Tensor& parameter) {
      return sum.defined() ? sum.to(parameter.scalar_type()) : sum;
    };
    return {{rounded(up_, experts_.up.weight), rounded(up_bias_, experts_.up.bias)},
            {rounded(down_, experts_.down.weight), rounded(down_bias_, experts_.down.bias)}};
  }

 private:
  static torch::Tensor add_sum(const torch::Tensor& weight, bool wanted, torch::Tensor& sum) {
    if (!wanted || sum.defined()) return {};
    return sum = at::zeros(weight.sizes(),
                           weight.options().dtype(at::toOpMathType(weight.scalar_type())));
  }
  static void add(torch::Tensor& sum, const torch::Tensor& gradient) {
    if (!gradient.defined()) return;
    const auto wide = gradient.to(at::toOpMathType(gradient.scalar_type()));
    sum = sum.defined() ? sum.add_(wide) : wide;
  }

  const ExpertProjections& experts_;
  WantedGradients wanted_;
  torch::Tensor up_, down_, up_bias_, down_bias_;
};

/// The tensors that backward needs.
struct SavedInRounds {
  torch::Tensor x;  ///< [T, h]
  ExpertProjections experts;

  auto tensors() { return std::tuple_cat(std::tie(x), tensors_of(experts)); }
};

struct ThroughExpertsInRounds : torch::autograd::Function<ThroughExpertsInRounds> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x,
                               const torch::Tensor& /*weights*/, const torch::Tensor& up_weight,
                               const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const std::optional<torch::Tensor>& down_bias,
                               const c10::intrusive_ptr<StepInRounds>& step) {
    const ExpertProjections experts{projection(up_weight, up_bias),
                                    projection(down_weight, down_bias)};
    Returned returned(*step, x.options(), x.size(1));
    for (const ExchangePlan& round : step->rounds.plans) {
      const auto rows = stage("anabranch.dispatch", [&] { return step->dispatch(x, round); });
      auto results = feed_forward(step->expert, permuted(rows, round), experts, round.expert_counts,
                                  /*keep_hidden=*/false)
                         .results;
      const auto sums = stage("anabranch.unpermute",
                              [&] { return unpermute(results, round.local_weights, round); });
      results.reset();
      stage("anabranch.combine", [&] { returned.combine({sums, {}}, round); });
    }
    context->save_for_backward(pack(SavedInRounds{x, experts}));
    context->saved_data["step"] = torch::IValue::make_capsule(step);
    return stage("anabranch.combine", [&] { return returned.sum_of_tokens(); });
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("MoELayer");
    const torch::NoGradGuard no_grad;
    const auto saved = unpack<SavedInRounds>(context->get_saved_variables());
    const ExpertProjections& experts = saved.experts;
    const auto step =
        c10::static_intrusive_pointer_cast<StepInRounds>(context->saved_data["step"].toCapsule());
    const auto dy = gradients[0].contiguous();
    auto wanted = wanted_gradients(context, /*first=*/2, experts);
    wanted.sums = step->main_grad;
    GradientSums sums(experts, wanted);
    Returned returned(*step, dy.options(), dy.size(1));
    torch::Tensor dweights;  // [T · top_k]
    for (const ExchangePlan& round : step->rounds.plans) {
      const auto dy_rows =
          stage("anabranch.combine.backward", [&] { return step->dispatch(dy, round); });
      const auto rows = stage("anabranch.dispatch", [&] { return step->dispatch(saved.x, round); });
      auto found = feed_forward_backward(step->expert, permuted(dy_rows, round),
                                         permuted(rows, round), /*hidden=*/{}, round.local_weights,
                                         experts, round.expert_counts, false, sums.wanted());
      sums.add_biases(found.parameters);
      const auto dsums =
          stage("anabranch.permute.backward", [&] { return unpermute(found.dx, {}, round); });
      found.dx.reset();
      const auto values = stage("anabranch.dispatch.backward", [&] {
        return returned.combine({dsums, found.drouting_weights}, round);
      });
      if (!dweights.defined()) {
        dweights = at::zeros({round.tokens * round.top_k}, values.options());
      }
      dweights.scatter_(0, round.send_order, values);
    }
    const auto of_parameters = sums.gradients();
    return {stage("anabranch.dispatch.backward", [&] { return returned.sum_of_tokens(); }),
            dweights.view({step->rounds.plans[0].tokens, step->rounds.plans[0].top_k}),
            of_parameters.up.weight,
            of_parameters.down.weight,
            of_parameters.up.bias,
            of_parameters.down.bias,
            {}};
  }
};

}  // namespace

torch::Tensor through_experts_in_rounds(const torch::Tensor& x, const torch::Tensor& weights,
                                        const ExpertProjections& experts,
                                        const WeightSums& main_grad, const FeedForward& expert,
                                        const Exchange& exchange, Rounds rounds) {
  const auto step =
      c10::make_intrusive<StepInRounds>(exchange, std::move(rounds), expert, main_grad);
  return ThroughExpertsInRounds::apply(x, weights, experts.up.weight, experts.down.weight,
                                       given(experts.up.bias), given(experts.down.bias), step);
}

}  // namespace anabranch
