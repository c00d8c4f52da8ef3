#include "experts/feed_forward.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "experts/parts.h"
#include "kernels/activation.h"
#include "kernels/bias.h"
#include "kernels/rows.h"
#include "support/large_pages.h"
#include "support/stage.h"

namespace anabranch {
namespace {

/// Some of the first dimension. All of it is the tensor itself: a view costs the host a microsecond.
torch::Tensor narrowed(const torch::Tensor& tensor, int64_t first, int64_t count) {
  return !tensor.defined() || tensor.size(0) == count ? tensor : tensor.narrow(0, first, count);
}

/// Neighbouring experts and their rows.
struct Part {
  int64_t first_expert = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  ExpertCounts counts;

  torch::Tensor rows_of(const torch::Tensor& tensor) const {
    return narrowed(tensor, first_row, rows);
  }
  /// This part's of `from`: copied, unless whoever multiplies them `gathers`.
  ProductRows take(const IndexedRows& from, bool gathers) const {
    if (!from.index.defined()) {
      return rows_of(from.rows);
    }
    if (gathers) {
      return {from.rows, rows_of(from.index)};
    }
    const Stage named("anabranch.permute");
    const RowKernels& kernels = RowKernels::on(from.rows.device());
    return rows == from.index.size(0) && from.places.members.defined()
               ? kernels.scatter_rows(from.rows, from.places)
               : kernels.gather_rows(from.rows, rows_of(from.index));
  }
  torch::Tensor experts_of(const torch::Tensor& tensor) const {
    return narrowed(tensor, first_expert, counts.experts());
  }
  Projection experts_of(const Projection& projection) const {
    return {experts_of(projection.weight), experts_of(projection.bias)};
  }
};

/// On a CPU: whole experts in parts of about equal rows (an expert is never cut), at least one, also of no
/// experts.
std::vector<Part> cut(const std::vector<int64_t>& counts) {
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t parts = most_parts(torch::kCPU, rows);
  if (parts == 1) {
    return {{0, 0, rows, counts}};
  }
  std::vector<Part> result;
  int64_t row = 0;
  std::vector<int64_t> own;
  const auto finish = [&](int64_t end) {
    const int64_t first_row = result.empty() ? 0 : result.back().first_row + result.back().rows;
    result.push_back({end - static_cast<int64_t>(own.size()), first_row, row - first_row, own});
    own.clear();
  };
  for (int64_t e = 0; e < static_cast<int64_t>(counts.size()); ++e) {
    // A new part begins where the ones before it have had their share.
    const auto made = static_cast<int64_t>(result.size()) + 1;
    const int64_t before = result.empty() ? 0 : result.back().first_row + result.back().rows;
    if (row > before && row * parts >= rows * made) {
      finish(e);
    }
    own.push_back(counts[e]);
    row += own.back();
  }
  finish(static_cast<int64_t>(counts.size()));
  return result;
}

/// One for each chunk that has experts, and at least one.
std::vector<Part> parts_of_chunks(const ExpertCounts& counts, const std::vector<int64_t>& chunks) {
  std::vector<Part> parts;
  for (const int64_t end : chunks) {
    const int64_t first =
        parts.empty() ? 0 : parts.back().first_expert + parts.back().counts.experts();
    if (end > first || (parts.empty() && end == chunks.back())) {
      const auto begin = counts.on_host().begin();
      ExpertCounts own(std::vector<int64_t>(begin + first, begin + end));
      parts.push_back(
          {first, parts.empty() ? 0 : parts.back().first_row + parts.back().rows, own.rows(), own});
    }
  }
  return parts;
}

/// On a CPU the same whatever the chunks of an exchange are, and whatever there is room for, since a product may
/// be cut otherwise, and so rounded otherwise, beside other experts'; on a GPU one a chunk, where there are several.
std::vector<Part> parts_of(const ExpertCounts& counts, torch::Device device,
                           const std::vector<int64_t>& chunks) {
  if (device.is_cpu()) {
    return cut(counts.on_host());
  }
  if (chunks.size() > 1) {
    return parts_of_chunks(counts, chunks);
  }
  return {{0, 0, counts.rows(), counts}};
}

/// Where a feed-forward that works through its parts is in a pipeline.
template <typename Output>
class Turns {
 public:
  explicit Turns(const Pipeline<Output>& pipeline) : pipeline_(pipeline) {}

  void wait_for(const Part& part) {
    while (waited_ < chunks() && (waited_ == 0 || pipeline_.experts[waited_ - 1] < end_of(part))) {
      wait_for_next();
    }
  }
  /// Whether a chunk has gone on.
  bool go_on_after(const Part& part, const Output& output) {
    const size_t before = gone_;
    for (; gone_ < chunks() && pipeline_.experts[gone_] <= end_of(part); ++gone_) {
      if (waited_ == gone_) {
        wait_for_next();  // for no rows
      }
      pipeline_.go_on(output);
    }
    return gone_ > before;
  }

 private:
  static int64_t end_of(const Part& part) { return part.first_expert + part.counts.experts(); }
  size_t chunks() const { return pipeline_.experts.size(); }
  void wait_for_next() {
    pipeline_.wait_for_next();
    ++waited_;
  }

  const Pipeline<Output>& pipeline_;
  size_t waited_ = 0;
  size_t gone_ = 0;
};

bool gathers(const FeedForward& expert, GatheredRows rows, const Projection& projection) {
  const auto& weight = projection.weight;
  return expert.engine->gathers(rows, weight.scalar_type(), weight.size(1), weight.size(2));
}

/// rows [P, in] → result [P, out].
void project(const FeedForward& expert, const ProductRows& rows, const Projection& projection,
             const ExpertCounts& counts, torch::Tensor& result) {
  expert.engine->forward(rows, projection.weight, counts, result);
  if (projection.bias.defined()) {
    BiasKernels::on(result.device()).add_bias(result, projection.bias, counts);
  }
}

/// rows [P, h] → hidden [P, n or 2n]; returns its activation, [P, n].
torch::Tensor project_activated(const FeedForward& expert, const ProductRows& rows,
                                const Projection& up, const ExpertCounts& counts,
                                torch::Tensor& hidden) {
  const Stage named("anabranch.up");
  if (!up.bias.defined()) {
    return expert.engine->forward_activated(rows, up.weight, counts, expert.activation, hidden);
  }
  project(expert, rows, up, counts, hidden);
  return ActivationKernels::on(hidden.device()).activate(hidden, expert.activation);
}

torch::Tensor up_projection(const FeedForward& expert, const Part& part, const IndexedRows& x,
                            const Projection& up) {
  auto hidden = at::empty({part.rows, up.weight.size(1)}, up.weight.options());
  project(expert, part.take(x, gathers(expert, GatheredRows::kForwardX, up)), part.experts_of(up),
          part.counts, hidden);
  return hidden;
}

/// Makes room for a parameter's gradient where one is wanted. Not before it is found: until then
/// other values are alive.
void make_room(torch::Tensor& gradient, const torch::Tensor& parameter, bool wanted) {
  if (wanted && parameter.defined() && !gradient.defined()) {
    gradient = at::empty_like(parameter);
  }
}

/// The weight's gradient, where it is wanted: into `dweight` or added to `sum`, whichever is defined.
void weight_gradient(const FeedForward& expert, const ProductRows& dy, const ProductRows& x,
                     const ExpertCounts& counts, torch::Tensor dweight, torch::Tensor sum) {
  if (dweight.defined()) {
    expert.engine->wgrad(dy, x, counts, dweight);
  } else if (sum.defined()) {
    expert.engine->wgrad_accumulate(dy, x, counts, sum);
    sum.unsafeGetTensorImpl()->bump_version();  // an engine may write by its address alone
  }
}

/// A part's way upstream, whose results it writes to their places in `gradient`. What the weights' gradients
/// are made of lives until they are.
class PartBackward {
 public:
  PartBackward(const Part& part, const FeedForward& expert, const ExpertProjections& parameters,
               const WantedGradients& wanted, FeedForwardGradient& gradient)
      : part_(part),
        expert_(expert),
        parameters_(parameters),
        wanted_(wanted),
        gradient_(gradient) {}

  /// Through the down-projection and the activation. `hidden` is the part's own, and so is `dhidden`,
  /// which receives its gradient and may be the same.
  void through_down(const IndexedRows& dy, const torch::Tensor& hidden,
                    const torch::Tensor& dhidden, const torch::Tensor& routing_weights) {
    // Biases read copied rows.
    const bool by_index = !parameters_.down.bias.defined() &&
                          gathers(expert_, GatheredRows::kBackwardDy, parameters_.down);
    dresults_ = part_.take(dy, by_index);
    const Stage named("anabranch.down.backward");
    routing_weights_ = routing_weights;
    const Projection down = part_.experts_of(parameters_.down);
    auto drouting_weights = part_.rows_of(gradient_.drouting_weights);
    GroupedGemmEngine::ActivatedGradient activation = {
        dhidden, drouting_weights, at::empty({part_.rows, down.weight.size(2)}, hidden.options())};
    expert_.engine->dgrad_activated(dresults_, down.weight, part_.counts, expert_.activation,
                                    hidden, routing_weights, activation);
    if (down.bias.defined()) {
      drouting_weights.add_(
          BiasKernels::on(hidden.device()).bias_dot(dresults_.rows, down.bias, part_.counts));
    }
    dhidden_ = dhidden;
    activated_ = activation.activated;
  }

  void down_weights() {
    const Stage named("anabranch.down.backward");
    auto& [dweight, dbias] = gradient_.parameters.down;
    make_room(dweight, parameters_.down.weight,
              wanted_.down_weight && !wanted_.sums.down.defined());
    make_room(dbias, parameters_.down.bias, wanted_.down_bias);
    if (wanted_.down_weight) {
      weight_gradient(expert_, dresults_, activated_, part_.counts, part_.experts_of(dweight),
                      part_.experts_of(wanted_.sums.down));
    }
    if (dbias.defined()) {
      part_.experts_of(dbias).copy_(
          BiasKernels::on(dbias.device())
              .bias_gradient(dresults_.rows, routing_weights_, part_.counts));
    }
    dresults_ = torch::Tensor();
    activated_.reset();
  }

  void up_weights(const IndexedRows& x) {
    const Stage named("anabranch.up.backward");
    auto& [dweight, dbias] = gradient_.parameters.up;
    make_room(dweight, parameters_.up.weight, wanted_.up_weight && !wanted_.sums.up.defined());
    make_room(dbias, parameters_.up.bias, wanted_.up_bias);
    if (wanted_.up_weight) {
      weight_gradient(expert_, dhidden_,
                      part_.take(x, gathers(expert_, GatheredRows::kWgradX, parameters_.up)),
                      part_.counts, part_.experts_of(dweight), part_.experts_of(wanted_.sums.up));
    }
    if (dbias.defined()) {
      part_.experts_of(dbias).copy_(
          BiasKernels::on(dhidden_.device()).bias_gradient(dhidden_, {}, part_.counts));
    }
  }

  void through_up() {
    const Stage named("anabranch.up.backward");
    const auto& weight = parameters_.up.weight;
    if (!gradient_.dx.defined()) {  // not sooner: another part's rows may have left their memory
      gradient_.dx = on_large_pages(
          at::empty({gradient_.drouting_weights.size(0), weight.size(2)}, weight.options()));
    }
    auto dx = part_.rows_of(gradient_.dx);
    expert_.engine->dgrad(dhidden_, part_.experts_of(weight), part_.counts, dx);
  }

 private:
  Part part_;
  const FeedForward& expert_;
  const ExpertProjections& parameters_;
  const WantedGradients& wanted_;
  FeedForwardGradient& gradient_;
  torch::Tensor routing_weights_;
  ProductRows dresults_ = torch::Tensor();  ///< [part's rows, h]
  torch::Tensor activated_;                 ///< [part's rows, n]
  torch::Tensor dhidden_;                   ///< [part's rows, n or 2n]
};

}  // namespace

FeedForwardOutput feed_forward(const FeedForward& expert, const IndexedRows& x,
                               const ExpertProjections& parameters, const ExpertCounts& counts,
                               bool keep_hidden, const Pipeline<FeedForwardOutput>& pipeline) {
  const auto options = x.rows.options();
  const int64_t rows = (x.index.defined() ? x.index : x.rows).size(0);
  FeedForwardOutput output;
  if (keep_hidden) {
    output.hidden = on_large_pages(at::empty({rows, parameters.up.weight.size(1)}, options));
  }
  Turns turns(pipeline);
  for (const Part& part : parts_of(counts, x.rows.device(), pipeline.experts)) {
    turns.wait_for(part);
    auto hidden = keep_hidden ? part.rows_of(output.hidden)
                              : at::empty({part.rows, parameters.up.weight.size(1)}, options);
    auto activated = project_activated(
        expert, part.take(x, gathers(expert, GatheredRows::kForwardX, parameters.up)),
        part.experts_of(parameters.up), part.counts, hidden);
    hidden.reset();
    if (!output.results.defined()) {
      output.results = on_large_pages(at::empty({rows, parameters.down.weight.size(1)}, options));
    }
    stage("anabranch.down", [&] {
      auto results = part.rows_of(output.results);
      project(expert, activated, part.experts_of(parameters.down), part.counts, results);
    });
    activated.reset();
    turns.go_on_after(part, output);
  }
  return output;
}

FeedForwardGradient feed_forward_backward(const FeedForward& expert, const IndexedRows& dy,
                                          const IndexedRows& x, const torch::Tensor& hidden,
                                          const torch::Tensor& routing_weights,
                                          const ExpertProjections& parameters,
                                          const ExpertCounts& counts, bool overwrite_hidden,
                                          const WantedGradients& wanted,
                                          const Pipeline<FeedForwardGradient>& pipeline) {
  const auto options = x.rows.options();
  const int64_t rows = (x.index.defined() ? x.index : x.rows).size(0);
  FeedForwardGradient gradient;
  gradient.drouting_weights =
      at::empty({rows}, options.dtype(at::toOpMathType(options.dtype().toScalarType())));
  const auto begin = [&](const Part& part) {
    const auto own =
        hidden.defined() ? part.rows_of(hidden) : up_projection(expert, part, x, parameters.up);
    const auto dhidden = hidden.defined() && !overwrite_hidden ? at::empty_like(own) : own;
    PartBackward backward(part, expert, parameters, wanted, gradient);
    backward.through_down(dy, own, dhidden, part.rows_of(routing_weights));
    return backward;
  };
  Turns turns(pipeline);
  std::vector<PartBackward> without_weights;
  for (const Part& part : parts_of(counts, x.rows.device(), pipeline.experts)) {
    turns.wait_for(part);
    if (!pipeline.weights_last) {
      {
        PartBackward backward = begin(part);
        backward.down_weights();
        backward.up_weights(x);
        backward.through_up();
      }
      turns.go_on_after(part, gradient);
      continue;
    }
    without_weights.push_back(begin(part));
    without_weights.back().through_up();
    if (turns.go_on_after(part, gradient)) {
      for (PartBackward& waiting : std::exchange(without_weights, {})) {
        waiting.down_weights();
        waiting.up_weights(x);
      }
    }
  }
  return gradient;
}

}  // namespace anabranch
