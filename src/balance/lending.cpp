#include "balance/lending.h"

#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <anabranch/communicator.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <future>
#include <utility>

#include "experts/feed_forward.h"
#include "support/given.h"
#include "support/numbers_on.h"
#include "support/single_backward.h"
#include "support/stage.h"
#include "support/sum.h"

namespace anabranch {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Adds `terms` to the rows of `sums` at `places`, which are distinct: without atomics, on a GPU too.
void add_at(torch::Tensor sums, const torch::Tensor& places, const torch::Tensor& terms) {
  sums.index_copy_(0, places, sums.index_select(0, places).add_(terms.to(sums.scalar_type())));
}

/// Parameters of k lent experts from their owners to their borrowers, and sums of gradients back; as rows [.., n] of
/// all of an expert's numbers, which are cut into a slice for each rank.
class Lending {
 public:
  Lending(const std::vector<Loan>& loans, const ExpertPlacement& placement,
          Communicator& communicator)
      : communicator_(&communicator),
        loans_(static_cast<int64_t>(loans.size())),
        lent_(placement.num_ranks, 0),
        borrowed_(loans_by_borrower(loans, placement.num_ranks)) {
    const auto place_of = placement.place_of_experts();
    for (const Loan& loan : loans) {
      ++lent_[loan.owner];
      if (loan.owner == communicator.rank()) {
        own_.push_back(place_of[loan.expert] - placement.first_place(loan.owner));
      }
    }
  }

  /// Places among this rank's experts of those that it lends.
  torch::Tensor own(torch::Device device) const { return numbers_on(device, own_); }
  bool lends() const { return !own_.empty(); }
  int64_t borrowed() const { return static_cast<int64_t>(borrowed_[communicator_->rank()].size()); }

  /// [own, n] → [borrowed, n]
  torch::Tensor lend(const torch::Tensor& own) const {
    const auto slices = at::empty({loans_, slice(own)}, own.options());
    communicator_->all_to_all_v(
        {{in_slices(own), each(own.size(0)), slices, lent_, by_slice(own)}});
    const auto received = at::empty({ranks(), borrowed(), slice(own)}, own.options());
    communicator_->all_to_all_v({{slices, borrowed_of_each(), received.flatten(0, 1),
                                  each(borrowed()), by_borrower(own.device())}});
    return whole(received, own.size(1));
  }
  /// [borrowed, n] of every rank → the sums over borrowers [own, n]
  torch::Tensor collect(const torch::Tensor& terms) const {
    const auto counts = borrowed_of_each();
    const auto received = at::empty({sum(counts), slice(terms)}, terms.options());
    communicator_->all_to_all_v(
        {{in_slices(terms), each(borrowed()), received, counts, by_slice(terms)}});
    const auto sums = at::zeros({loans_, slice(terms)}, terms.options());
    int64_t next = 0;
    for (int64_t rank = 0; rank < ranks(); ++rank) {
      if (counts[rank] == 0) continue;
      add_at(sums, numbers_on(terms.device(), borrowed_[rank]),
             received.narrow(0, next, counts[rank]));
      next += counts[rank];
    }
    const auto count = static_cast<int64_t>(own_.size());
    const auto slices = at::empty({ranks(), count, sums.size(1)}, sums.options());
    communicator_->all_to_all_v({{sums, lent_, slices.flatten(0, 1), each(count)}});
    return whole(slices, terms.size(1));
  }

 private:
  int64_t ranks() const { return communicator_->size(); }
  std::vector<int64_t> each(int64_t rows) const {
    return std::vector<int64_t>(borrowed_.size(), rows);
  }
  std::vector<int64_t> borrowed_of_each() const {
    std::vector<int64_t> counts;
    for (const auto& loans : borrowed_) counts.push_back(static_cast<int64_t>(loans.size()));
    return counts;
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
  /// The loans by borrower.
  torch::Tensor by_borrower(torch::Device device) const {
    std::vector<int64_t> all;
    for (const auto& loans : borrowed_) all.insert(all.end(), loans.begin(), loans.end());
    return numbers_on(device, all);
  }
  /// [W, k, slice] → [k, n]
  static torch::Tensor whole(const torch::Tensor& slices, int64_t width) {
    return slices.transpose(0, 1).flatten(1).narrow(1, 0, width);
  }

  Communicator* communicator_;
  int64_t loans_;
  std::vector<int64_t> lent_;                   ///< [W] experts that each lends
  std::vector<std::vector<int64_t>> borrowed_;  ///< [W] loans of each, ascending
  std::vector<int64_t> own_;
};

/// Of experts' parameters those at `places`, side by side, [places, n], in the order of tensors_of.
torch::Tensor side_by_side(ExpertProjections experts, const torch::Tensor& places) {
  std::vector<torch::Tensor> flat;
  const auto add = [&](const torch::Tensor& parameter) {
    if (parameter.defined()) flat.push_back(parameter.index_select(0, places).flatten(1));
  };
  std::apply([&](const auto&... parameter) { (add(parameter), ...); }, tensors_of(experts));
  return at::cat(flat, 1);
}

/// Of `count` experts that are shaped as `like`.
ExpertProjections empty_like(ExpertProjections like, int64_t count, torch::TensorOptions options) {
  const auto empty = [&](torch::Tensor& of) {
    if (!of.defined()) return;
    auto sizes = of.sizes().vec();
    sizes[0] = count;
    of = at::empty(sizes, options);
  };
  std::apply([&](auto&... parameter) { (empty(parameter), ...); }, tensors_of(like));
  return like;
}

/// The reverse of side_by_side.
void take_apart(const torch::Tensor& flat, ExpertProjections into) {
  int64_t next = 0;
  const auto take = [&](const torch::Tensor& parameter) {
    if (!parameter.defined()) return;
    const auto sizes = parameter.sizes();
    const int64_t count = c10::multiply_integers(sizes.begin() + 1, sizes.end());
    parameter.view({flat.size(0), count}).copy_(flat.narrow(1, next, count));
    next += count;
  };
  std::apply([&](const auto&... parameter) { (take(parameter), ...); }, tensors_of(into));
}

/// As a function's arguments and results have them: the biases last, and where there are none neither.
variable_list listed(const ExpertProjections& experts) {
  variable_list list = {experts.up.weight, experts.down.weight};
  if (experts.up.bias.defined()) {
    list.push_back(experts.up.bias);
    list.push_back(experts.down.bias);
  }
  return list;
}
ExpertProjections projections_of(const torch::Tensor* list, bool biases) {
  return {{list[0], biases ? list[2] : torch::Tensor()},
          {list[1], biases ? list[3] : torch::Tensor()}};
}

/// A step's lent weights on their way, and what forward leaves for backward.
struct Borrowing : torch::CustomClassHolder {
  Borrowing(Exchange exchange, const std::vector<Loan>& loans, WeightSums main_grad,
            std::shared_ptr<Lane> lane)
      : exchange(std::move(exchange)),
        lane(std::move(lane)),
        lending(loans, this->exchange.placement(),
                this->lane ? this->lane->communicator() : this->exchange.communicator()),
        main_grad(std::move(main_grad)) {}
  ~Borrowing() override {
    if (under_way.valid()) under_way.wait();  // it writes here
  }
  Borrowing(const Borrowing&) = delete;
  Borrowing& operator=(const Borrowing&) = delete;

  /// `way` to the end, or its begin.
  void travel(std::function<void()> way) {
    if (lane) {
      under_way = lane->run(std::move(way));
    } else {
      way();
    }
  }
  void wait() {
    if (under_way.valid()) std::exchange(under_way, {}).get();
  }
  /// What this rank has found of others' experts: at once where it travels beside what follows, otherwise when it is taken
  /// back, as owners would wait here for those who compute their experts' other tokens meanwhile.
  void give_back(torch::Tensor terms) {
    found = std::move(terms);
    if (lane) travel([this] { collect(); });
  }
  /// [own, n] what has been found of the own, side by side.
  torch::Tensor take_back() {
    if (lane) {
      wait();
    } else {
      collect();
    }
    return std::exchange(collected, {});
  }

  void collect() { collected = lending.collect(std::exchange(found, {})); }

  /// The gradients of what was borrowed, unrounded. `biases`: those that autograd has, undefined where it has none.
  ExpertProjections terms(const torch::Tensor* biases) const {
    ExpertProjections terms{{sums.up, {}}, {sums.down, {}}};
    if (biases != nullptr) {
      const auto bias_of = [](const torch::Tensor& gradient, const torch::Tensor& sum) {
        return gradient.defined() ? gradient.to(sum.scalar_type())
                                  : at::zeros({sum.size(0), sum.size(1)}, sum.options());
      };
      terms.up.bias = bias_of(biases[0], sums.up);
      terms.down.bias = bias_of(biases[1], sums.down);
    }
    return terms;
  }

  Exchange exchange;  // whose communicator lives as long
  std::shared_ptr<Lane> lane;
  Lending lending;
  WeightSums main_grad;
  WeightSums sums;
  torch::Tensor found, collected;  ///< gradients on their way back
  std::shared_future<void> under_way;
};

/// Which another thread may fill while autograd takes the tensors themselves.
ExpertProjections detached(ExpertProjections experts) {
  const auto detach = [](torch::Tensor& parameter) {
    if (parameter.defined()) parameter = parameter.detach();
  };
  std::apply([&](auto&... parameter) { (detach(parameter), ...); }, tensors_of(experts));
  return experts;
}

/// Own experts → the same, and those that are borrowed. What passes through here comes back here, so that backward
/// adds to its gradients where they are. `rows` and `weights`, of which it reads nothing, have every rank take part that
/// wants any gradient of the step.
struct Borrow : torch::autograd::Function<Borrow> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& up_weight,
                               const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const std::optional<torch::Tensor>& down_bias,
                               const torch::Tensor& /*rows*/, const torch::Tensor& /*weights*/,
                               const c10::intrusive_ptr<Borrowing>& borrowing) {
    const Stage named("anabranch.loans");
    const ExpertProjections own{projection(up_weight, up_bias), projection(down_weight, down_bias)};
    const auto& lending = borrowing->lending;
    const auto lent = side_by_side(own, lending.own(up_weight.device()));
    const auto brought = empty_like(own, lending.borrowed(), lent.options());
    borrowing->travel(
        [&lending, lent, into = detached(brought)] { take_apart(lending.lend(lent), into); });
    variable_list result = listed(own);
    context->save_for_backward(result);
    context->saved_data["borrowing"] = torch::IValue::make_capsule(borrowing);
    context->set_materialize_grads(false);
    for (const auto& parameter : listed(brought)) result.push_back(parameter);
    return result;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("MoELayer");
    const torch::NoGradGuard no_grad;
    const Stage named("anabranch.loans.backward");
    const auto parameters = context->get_saved_variables();
    const auto borrowing =
        c10::static_intrusive_pointer_cast<Borrowing>(context->saved_data["borrowing"].toCapsule());
    const size_t count = parameters.size();
    const bool biases = count == 4;
    const auto sums = borrowing->take_back();
    const auto like = projections_of(parameters.data(), biases);
    const auto arrived = empty_like(like, sums.size(0), sums.options());
    take_apart(sums, arrived);
    const auto own = listed(arrived);
    const auto places = borrowing->lending.own(parameters[0].device());
    const variable_list main_grads = {borrowing->main_grad.up, borrowing->main_grad.down, {}, {}};
    variable_list result(7);
    for (size_t i = 0; i < count; ++i) {
      if (!context->needs_input_grad(i)) continue;
      result[i] = gradients[i];
      if (!borrowing->lending.lends()) continue;
      if (!main_grads[i].defined() && !result[i].defined()) {
        result[i] = at::zeros_like(parameters[i]);
      }
      add_at(main_grads[i].defined() ? main_grads[i] : result[i], places, own[i]);
    }
    return result;
  }
};

/// What owners have computed, and borrowed experts → the same; and the way back of these experts' gradients.
struct GiveBack : torch::autograd::Function<GiveBack> {
  static variable_list forward(AutogradContext* context, const torch::Tensor& owned,
                               const torch::Tensor& up_weight, const torch::Tensor& down_weight,
                               const std::optional<torch::Tensor>& up_bias,
                               const std::optional<torch::Tensor>& down_bias,
                               const c10::intrusive_ptr<Borrowing>& borrowing) {
    context->saved_data["borrowing"] = torch::IValue::make_capsule(borrowing);
    context->set_materialize_grads(false);
    variable_list result = {owned.detach()};  // of which who gets it may change the numbers
    for (const auto& parameter :
         listed({projection(up_weight, up_bias), projection(down_weight, down_bias)})) {
      result.push_back(parameter);
    }
    return result;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_double_backward("MoELayer");
    const torch::NoGradGuard no_grad;
    const Stage named("anabranch.loans.backward");
    const auto borrowing =
        c10::static_intrusive_pointer_cast<Borrowing>(context->saved_data["borrowing"].toCapsule());
    const auto terms = borrowing->terms(gradients.size() == 5 ? &gradients[3] : nullptr);
    const auto all = at::arange(borrowing->lending.borrowed(),
                                torch::dtype(at::kLong).device(borrowing->sums.up.device()));
    borrowing->give_back(side_by_side(terms, all));
    borrowing->sums.up.zero_();  // for another backward of the same graph
    borrowing->sums.down.zero_();
    return {gradients[0], {}, {}, {}, {}, {}};
  }
};

}  // namespace

Borrowed borrow(const ExpertProjections& own, const WeightSums& main_grad,
                const std::vector<Loan>& loans, const Exchange& exchange, const torch::Tensor& rows,
                const torch::Tensor& weights, std::shared_ptr<Lane> lane) {
  const auto borrowing =
      c10::make_intrusive<Borrowing>(exchange, loans, main_grad, std::move(lane));
  const auto experts = Borrow::apply(own.up.weight, own.down.weight, given(own.up.bias),
                                     given(own.down.bias), rows, weights, borrowing);
  const bool biases = own.up.bias.defined();
  Borrowed borrowed;
  borrowed.travel = borrowing;
  borrowed.own = projections_of(experts.data(), biases);
  // Of what is not trained a gradient is found, too, and comes to nothing: it is in no sum.
  const auto trained_sum = [](const torch::Tensor& weight, const torch::Tensor& sum) {
    return weight.requires_grad() ? sum : torch::Tensor();
  };
  borrowed.main_grad = {trained_sum(own.up.weight, main_grad.up),
                        trained_sum(own.down.weight, main_grad.down)};
  borrowed.experts = projections_of(&experts[experts.size() / 2], biases);
  const auto sum_of = [](const torch::Tensor& weight) {
    return at::zeros(weight.sizes(),
                     weight.options().dtype(at::toOpMathType(weight.scalar_type())));
  };
  const auto& [up, down] = borrowed.experts;
  if (up.weight.requires_grad()) {
    borrowing->sums = borrowed.sums = {sum_of(up.weight), sum_of(down.weight)};
  }
  return borrowed;
}

torch::Tensor await_borrowed(const torch::Tensor& owned, Borrowed& borrowed) {
  const auto borrowing = c10::static_intrusive_pointer_cast<Borrowing>(borrowed.travel);
  stage("anabranch.loans", [&] { borrowing->wait(); });
  const auto& [up, down] = borrowed.experts;
  const auto passed =
      GiveBack::apply(owned, up.weight, down.weight, given(up.bias), given(down.bias), borrowing);
  borrowed.experts = projections_of(&passed[1], up.bias.defined());
  return passed[0];
}

}  // namespace anabranch
