#include "balance/shadows.h"

#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <anabranch/communicator.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "experts/feed_forward.h"
#include "support/given.h"
#include "support/single_backward.h"
#include "support/stage.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Parameters of k experts from their owners to all ranks, and sums of gradients back; as rows [k, n] of all of
/// an expert's numbers, which are cut into a slice [length] for each rank.
class Spreading {
 public:
  Spreading(const std::vector<int64_t>& shadowed, const ExpertPlacement& placement,
            Communicator& communicator)
      : communicator_(&communicator), of_rank_(placement.num_ranks, 0) {
    const auto place_of = placement.place_of_experts();
    int64_t owner = 0;
    for (const int64_t expert : shadowed) {
      while (place_of[expert] >= placement.first_place(owner + 1)) ++owner;
      ++of_rank_[owner];
      if (owner == communicator.rank()) {
        own_.push_back(place_of[expert] - placement.first_place(owner));
      }
    }
    shadowed_ = static_cast<int64_t>(shadowed.size());
  }

  int64_t shadowed() const { return shadowed_; }
  /// Places of this rank's among its experts.
  torch::Tensor own(torch::Device device) const { return at::tensor(own_, at::kLong).to(device); }

  /// [own, n] → [k, n]
  torch::Tensor spread(const torch::Tensor& own) const {
    const auto slices = at::empty({shadowed_, slice(own)}, own.options());
    communicator_->all_to_all_v(
        {{in_slices(own), each(own.size(0)), slices, of_rank_, by_slice(own)}});
    return whole(communicator_->all_gather(slices), own.size(1));
  }
  /// [k, n] of every rank → the sums over ranks [own, n]
  torch::Tensor collect(const torch::Tensor& terms) const {
    const auto received = at::empty({ranks(), shadowed_, slice(terms)}, terms.options());
    communicator_->all_to_all_v({{in_slices(terms), each(shadowed_), received.flatten(0, 1),
                                  each(shadowed_), by_slice(terms)}});
    auto sums = received[0];
    for (int64_t rank = 1; rank < ranks(); ++rank) {
      sums.add_(received[rank]);
    }
    const auto count = static_cast<int64_t>(own_.size());
    const auto slices = at::empty({ranks(), count, sums.size(1)}, sums.options());
    communicator_->all_to_all_v({{sums, of_rank_, slices.flatten(0, 1), each(count)}});
    return whole(slices, terms.size(1));
  }

 private:
  int64_t ranks() const { return communicator_->size(); }
  std::vector<int64_t> each(int64_t rows) const {
    return std::vector<int64_t>(of_rank_.size(), rows);
  }
  int64_t slice(const torch::Tensor& experts) const {
    return (experts.size(1) + ranks() - 1) / ranks();
  }
  /// [k, n] → [k · W, slice], the last filled up with zeros
  torch::Tensor in_slices(const torch::Tensor& experts) const {
    const int64_t length = slice(experts);
    auto slices = at::zeros({experts.size(0), ranks() * length}, experts.options());
    slices.narrow(1, 0, experts.size(1)).copy_(experts);
    return slices.view({experts.size(0) * ranks(), length});
  }
  /// The slices by rank and expert.
  torch::Tensor by_slice(const torch::Tensor& experts) const {
    const int64_t count = experts.size(0);
    return at::arange(count * ranks(), experts.options().dtype(at::kLong))
        .view({count, ranks()})
        .t()
        .flatten();
  }
  /// [W, k, slice] → [k, n]
  static torch::Tensor whole(const torch::Tensor& slices, int64_t width) {
    return slices.transpose(0, 1).flatten(1).narrow(1, 0, width);
  }

  Communicator* communicator_;
  std::vector<int64_t> of_rank_;  ///< [W] shadowed experts of each
  std::vector<int64_t> own_;
  int64_t shadowed_ = 0;
};

/// Experts' parameters side by side, [experts, n], in the order of tensors_of.
torch::Tensor side_by_side(ExpertProjections experts) {
  std::vector<torch::Tensor> flat;
  std::apply(
      [&](const auto&... tensor) {
        ((tensor.defined() ? flat.push_back(tensor.flatten(1)) : void()), ...);
      },
      tensors_of(experts));
  return at::cat(flat, 1);
}

/// Of experts that are shaped as `like`.
ExpertProjections apart(const torch::Tensor& flat, ExpertProjections like) {
  ExpertProjections experts;
  int64_t next = 0;
  const auto take = [&](torch::Tensor& into, const torch::Tensor& shape) {
    if (!shape.defined()) return;
    auto sizes = shape.sizes().vec();
    sizes[0] = flat.size(0);
    const int64_t count = c10::multiply_integers(sizes.begin() + 1, sizes.end());
    into = at::empty(sizes, flat.options());  // not a view: autograd takes it
    into.view({flat.size(0), count}).copy_(flat.narrow(1, next, count));
    next += count;
  };
  take(experts.up.weight, like.up.weight);
  take(experts.up.bias, like.up.bias);
  take(experts.down.weight, like.down.weight);
  take(experts.down.bias, like.down.bias);
  return experts;
}

/// What forward leaves for backward.
struct Bringing : torch::CustomClassHolder {
  Bringing(Exchange exchange, const std::vector<int64_t>& shadowed, WeightSums main_grad)
      : exchange(std::move(exchange)),
        spreading(shadowed, this->exchange.placement(), this->exchange.communicator()),
        main_grad(std::move(main_grad)) {}

  Exchange exchange;  // whose communicator lives as long
  Spreading spreading;
  WeightSums main_grad;
  WeightSums sums;
};

/// The gradient of a parameter from that of this rank's shadowed experts, [own, ..]; undefined where there are
/// none, or the sum has taken it.
torch::Tensor gradient_of(const torch::Tensor& parameter, const torch::Tensor& of_own,
                          const torch::Tensor& own, torch::Tensor main_grad) {
  if (own.size(0) == 0) return {};
  if (main_grad.defined()) {
    main_grad.index_add_(0, own, of_own);
    return {};
  }
  return at::zeros_like(parameter).index_copy_(0, own, of_own.to(parameter.scalar_type()));
}

struct BringShadows : torch::autograd::Function<BringShadows> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& up_weight,
                               const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const std::optional<torch::Tensor>& down_bias,
                               const c10::intrusive_ptr<Bringing>& bringing) {
    const Stage named("anabranch.shadows");
    const ExpertProjections own{projection(up_weight, up_bias), projection(down_weight, down_bias)};
    const auto places = bringing->spreading.own(up_weight.device());
    const auto all = bringing->spreading.spread(side_by_side(own).index_select(0, places));
    const ExpertProjections brought = apart(all, own);
    context->save_for_backward({up_weight, down_weight, own.up.bias, own.down.bias});
    context->saved_data["bringing"] = torch::IValue::make_capsule(bringing);
    variable_list result = {brought.up.weight, brought.down.weight};
    if (brought.up.bias.defined()) {
      result.push_back(brought.up.bias);
      result.push_back(brought.down.bias);
    }
    return result;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("MoELayer");
    const torch::NoGradGuard no_grad;
    const Stage named("anabranch.shadows.backward");
    const auto saved = context->get_saved_variables();
    const auto bringing =
        c10::static_intrusive_pointer_cast<Bringing>(context->saved_data["bringing"].toCapsule());
    WeightSums& sums = bringing->sums;
    ExpertProjections terms{{sums.up, {}}, {sums.down, {}}};
    const bool biases = saved[2].defined();
    if (biases) {
      terms.up.bias = gradients[2].to(sums.up.scalar_type());
      terms.down.bias = gradients[3].to(sums.down.scalar_type());
    }
    const auto own = apart(bringing->spreading.collect(side_by_side(terms)), terms);
    sums.up.zero_();  // for another backward of the same graph
    sums.down.zero_();
    const auto places = bringing->spreading.own(saved[0].device());
    const auto& main_grad = bringing->main_grad;
    const auto wanted = [&](size_t i, const torch::Tensor& of_own, const torch::Tensor& sum) {
      return context->needs_input_grad(i) ? gradient_of(saved[i], of_own, places, sum)
                                          : torch::Tensor();
    };
    variable_list result = {wanted(0, own.up.weight, main_grad.up),
                            wanted(1, own.down.weight, main_grad.down)};
    result.push_back(biases ? wanted(2, own.up.bias, {}) : torch::Tensor());
    result.push_back(biases ? wanted(3, own.down.bias, {}) : torch::Tensor());
    result.emplace_back();
    return result;
  }
};

}  // namespace

SplitRouting split_routing(const Routing& routing, const std::vector<int64_t>& shadowed,
                           const ExpertPlacement& placement, int64_t rank) {
  const torch::NoGradGuard no_grad;
  std::vector<int64_t> place(placement.num_experts, -1);
  for (size_t i = 0; i < shadowed.size(); ++i) place[shadowed[i]] = static_cast<int64_t>(i);
  for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
    place[placement.at(rank, local).expert] = -1;
  }
  const auto& ids = routing.expert_ids;
  const auto places = at::tensor(place, at::kLong).to(ids.device());
  const auto staying = places.index_select(0, ids.clamp_min(0).flatten())
                           .view(ids.sizes())
                           .masked_fill_(ids < 0, -1);
  SplitRouting split{routing, routing};
  split.travelling.expert_ids = ids.masked_fill(staying >= 0, -1);
  split.staying.expert_ids = staying;
  split.travelling.may_skip = split.staying.may_skip = true;
  return split;
}

Shadows bring_shadows(const ExpertProjections& own, const WeightSums& main_grad,
                      const std::vector<int64_t>& shadowed, const Exchange& exchange) {
  const auto bringing = c10::make_intrusive<Bringing>(exchange, shadowed, main_grad);
  const auto brought = BringShadows::apply(own.up.weight, own.down.weight, given(own.up.bias),
                                           given(own.down.bias), bringing);
  Shadows shadows;
  shadows.experts.up.weight = brought[0];
  shadows.experts.down.weight = brought[1];
  if (brought.size() > 2) {
    shadows.experts.up.bias = brought[2];
    shadows.experts.down.bias = brought[3];
  }
  if (brought[0].requires_grad()) {
    const auto sum_of = [](const torch::Tensor& weight) {
      return at::zeros(weight.sizes(),
                       weight.options().dtype(at::toOpMathType(weight.scalar_type())));
    };
    bringing->sums = {sum_of(brought[0]), sum_of(brought[1])};
    shadows.sums = bringing->sums;
  }
  return shadows;
}

}  // namespace anabranch
