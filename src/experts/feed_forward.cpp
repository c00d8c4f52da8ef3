#include "experts/feed_forward.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <numeric>

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
  torch::Tensor take(const IndexedRows& from) const {
    if (!from.index.defined()) {
      return rows_of(from.rows);
    }
    const Stage named("anabranch.permute");
    const RowKernels& kernels = RowKernels::on(from.rows.device());
    return rows == from.index.size(0) ? kernels.scatter_rows(from.rows, from.places)
                                      : kernels.gather_rows(from.rows, rows_of(from.index));
  }
  torch::Tensor experts_of(const torch::Tensor& tensor) const {
    return narrowed(tensor, first_expert, counts.experts());
  }
  Projection experts_of(const Projection& projection) const {
    return {experts_of(projection.weight), experts_of(projection.bias)};
  }
};

/// Whole experts in parts of about equal rows, at most `parts` of them (an expert is never cut) and at
/// least one, also of no experts.
std::vector<Part> cut(const ExpertCounts& counts, int64_t parts) {
  if (parts == 1) {
    return {{0, 0, counts.rows(), counts}};
  }
  std::vector<Part> result;
  int64_t row = 0;
  std::vector<int64_t> own;
  const auto finish = [&](int64_t end) {
    const int64_t first_row = result.empty() ? 0 : result.back().first_row + result.back().rows;
    result.push_back({end - static_cast<int64_t>(own.size()), first_row, row - first_row, own});
    own.clear();
  };
  for (int64_t e = 0; e < counts.experts(); ++e) {
    // A new part begins where the ones before it have had their share.
    const auto made = static_cast<int64_t>(result.size()) + 1;
    const int64_t before = result.empty() ? 0 : result.back().first_row + result.back().rows;
    if (row > before && row * parts >= counts.rows() * made) {
      finish(e);
    }
    own.push_back(counts.on_host()[e]);
    row += own.back();
  }
  finish(counts.experts());
  return result;
}

std::vector<Part> parts_of(const ExpertCounts& counts, torch::Device device) {
  return cut(counts, most_parts(device));
}

/// rows [P, in] → result [P, out].
void project(const FeedForward& expert, const torch::Tensor& rows, const Projection& projection,
             const ExpertCounts& counts, torch::Tensor& result) {
  expert.engine->forward(rows, projection.weight, counts, result);
  if (projection.bias.defined()) {
    BiasKernels::on(result.device()).add_bias(result, projection.bias, counts);
  }
}

/// rows [P, h] → hidden [P, n or 2n]; returns its activation, [P, n].
torch::Tensor project_activated(const FeedForward& expert, const torch::Tensor& rows,
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
  project(expert, part.take(x), part.experts_of(up), part.counts, hidden);
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
void weight_gradient(const FeedForward& expert, const torch::Tensor& dy, const torch::Tensor& x,
                     const ExpertCounts& counts, torch::Tensor dweight, torch::Tensor sum) {
  if (dweight.defined()) {
    expert.engine->wgrad(dy, x, counts, dweight);
  } else if (sum.defined()) {
    expert.engine->wgrad_accumulate(dy, x, counts, sum);
    sum.unsafeGetTensorImpl()->bump_version();  // an engine may write by its address alone
  }
}

// A part's backward, written to its places in `gradient`.

/// Through the down-projection and the activation. `hidden` is the part's own, and so is `dhidden`,
/// which receives its gradient and may be the same.
void down_backward(const Part& part, const FeedForward& expert, const IndexedRows& dy,
                   const torch::Tensor& hidden, const torch::Tensor& dhidden,
                   const torch::Tensor& routing_weights, const Projection& parameters,
                   const WantedGradients& wanted, FeedForwardGradient& gradient) {
  const auto dresults = part.take(dy);
  const Stage named("anabranch.down.backward");
  const BiasKernels& kernels = BiasKernels::on(hidden.device());
  const Projection down = part.experts_of(parameters);
  auto drouting_weights = part.rows_of(gradient.drouting_weights);
  GroupedGemmEngine::ActivatedGradient activation = {
      dhidden, drouting_weights, at::empty({part.rows, down.weight.size(2)}, hidden.options())};
  expert.engine->dgrad_activated(dresults, down.weight, part.counts, expert.activation, hidden,
                                 routing_weights, activation);
  auto& [dweight, dbias] = gradient.parameters.down;
  make_room(dweight, parameters.weight, wanted.down_weight && !wanted.sums.down.defined());
  make_room(dbias, parameters.bias, wanted.down_bias);
  if (wanted.down_weight) {
    weight_gradient(expert, dresults, activation.activated, part.counts, part.experts_of(dweight),
                    part.experts_of(wanted.sums.down));
  }
  if (dbias.defined()) {
    part.experts_of(dbias).copy_(kernels.bias_gradient(dresults, routing_weights, part.counts));
  }
  if (down.bias.defined()) {
    drouting_weights.add_(kernels.bias_dot(dresults, down.bias, part.counts));
  }
}

/// Through the up-projection.
void up_backward(const Part& part, const FeedForward& expert, const IndexedRows& x,
                 const torch::Tensor& dhidden, const Projection& parameters,
                 const WantedGradients& wanted, FeedForwardGradient& gradient) {
  const Stage named("anabranch.up.backward");
  auto& [dweight, dbias] = gradient.parameters.up;
  make_room(dweight, parameters.weight, wanted.up_weight && !wanted.sums.up.defined());
  make_room(dbias, parameters.bias, wanted.up_bias);
  if (wanted.up_weight) {
    weight_gradient(expert, dhidden, part.take(x), part.counts, part.experts_of(dweight),
                    part.experts_of(wanted.sums.up));
  }
  if (dbias.defined()) {
    part.experts_of(dbias).copy_(
        BiasKernels::on(dhidden.device()).bias_gradient(dhidden, {}, part.counts));
  }
  if (!gradient.dx.defined()) {  // not sooner: another part's rows may have left their memory
    gradient.dx =
        on_large_pages(at::empty({gradient.drouting_weights.size(0), parameters.weight.size(2)},
                                 parameters.weight.options()));
  }
  auto dx = part.rows_of(gradient.dx);
  expert.engine->dgrad(dhidden, part.experts_of(parameters.weight), part.counts, dx);
}

}  // namespace

FeedForwardOutput feed_forward(const FeedForward& expert, const IndexedRows& x,
                               const ExpertProjections& parameters, const ExpertCounts& counts,
                               bool keep_hidden) {
  const auto options = x.rows.options();
  const int64_t rows = (x.index.defined() ? x.index : x.rows).size(0);
  FeedForwardOutput output;
  if (keep_hidden) {
    output.hidden = on_large_pages(at::empty({rows, parameters.up.weight.size(1)}, options));
  }
  for (const Part& part : parts_of(counts, x.rows.device())) {
    auto hidden = keep_hidden ? part.rows_of(output.hidden)
                              : at::empty({part.rows, parameters.up.weight.size(1)}, options);
    const auto activated = project_activated(expert, part.take(x), part.experts_of(parameters.up),
                                             part.counts, hidden);
    hidden.reset();
    if (!output.results.defined()) {
      output.results = on_large_pages(at::empty({rows, parameters.down.weight.size(1)}, options));
    }
    const Stage named("anabranch.down");
    auto results = part.rows_of(output.results);
    project(expert, activated, part.experts_of(parameters.down), part.counts, results);
  }
  return output;
}

FeedForwardGradient feed_forward_backward(const FeedForward& expert, const IndexedRows& dy,
                                          const IndexedRows& x, const torch::Tensor& hidden,
                                          const torch::Tensor& routing_weights,
                                          const ExpertProjections& parameters,
                                          const ExpertCounts& counts, bool overwrite_hidden,
                                          const WantedGradients& wanted) {
  const auto options = x.rows.options();
  const int64_t rows = (x.index.defined() ? x.index : x.rows).size(0);
  FeedForwardGradient gradient;
  gradient.drouting_weights =
      at::empty({rows}, options.dtype(at::toOpMathType(options.dtype().toScalarType())));
  for (const Part& part : parts_of(counts, x.rows.device())) {
    const auto own =
        hidden.defined() ? part.rows_of(hidden) : up_projection(expert, part, x, parameters.up);
    const auto dhidden = hidden.defined() && !overwrite_hidden ? at::empty_like(own) : own;
    down_backward(part, expert, dy, own, dhidden, part.rows_of(routing_weights), parameters.down,
                  wanted, gradient);
    up_backward(part, expert, x, dhidden, parameters.up, wanted, gradient);
  }
  return gradient;
}

}  // namespace anabranch
