#include "experts/feed_forward.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <utility>

#include "communicator/chunks.h"
#include "experts/parts.h"
#include "kernels/activation.h"
#include "kernels/bias.h"
#include "kernels/rows.h"
#include "support/large_pages.h"
#include "support/stage.h"
#include "support/sum.h"

namespace anabranch {
namespace {

/// Some of the first dimension. All of it is the tensor itself: a view costs the host a microsecond.
torch::Tensor narrowed(const torch::Tensor& tensor, int64_t first, int64_t count) {
  return !tensor.defined() || tensor.size(0) == count ? tensor : tensor.narrow(0, first, count);
}

/// Neighbouring experts and their rows, or some of one expert's.
struct Part {
  int64_t first_expert = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  ExpertCounts counts;

  torch::Tensor rows_of(const torch::Tensor& tensor) const {
    return narrowed(tensor, first_row, rows);
  }
  RowRange range() const { return {first_row, rows}; }
  /// Of a tensor with the rows of `all`, of which this is some.
  torch::Tensor rows_within(const Part& all, const torch::Tensor& tensor) const {
    return narrowed(tensor, first_row - all.first_row, rows);
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

bool overlap(const RowRange& a, const RowRange& b) {
  return std::max(a.first, b.first) < std::min(a.first + a.count, b.first + b.count);
}

/// Number of the last chunk that has some of these rows; −1: none has.
int64_t last_chunk_of(const RowRange& rows, const std::vector<RowRange>& chunks) {
  auto chunk = static_cast<int64_t>(chunks.size()) - 1;
  while (chunk >= 0 && !overlap(rows, chunks[chunk])) {
    --chunk;
  }
  return chunk;
}

/// Whole experts, whose weights' gradients are found at once.
struct WholeExperts {
  Part all;
  std::vector<Part>
      pieces;  ///< what is found of rows, one by one: all, or of one expert some at a time

  explicit WholeExperts(Part part, const std::vector<RowRange>& ranges = {})
      : all(std::move(part)) {
    for (const auto& [first, count] : ranges) {
      pieces.push_back({all.first_expert, first, count, std::vector<int64_t>{count}});
    }
    if (pieces.empty()) {
      pieces.push_back(all);
    }
  }
};

/// Takes experts one after another, and makes of them what goes together.
class Cutting {
 public:
  void take(int64_t rows) {
    own_.push_back(rows);
    row_ += rows;
  }
  /// Those taken since the last time, if of one expert in pieces.
  void finish(const std::vector<RowRange>& pieces = {}) {
    const auto experts = static_cast<int64_t>(own_.size());
    parts_.emplace_back(Part{first_expert_, first_row_, row_ - first_row_, std::exchange(own_, {})},
                        pieces);
    first_expert_ += experts;
    first_row_ = row_;
  }
  /// With at least one part, also of no experts.
  std::vector<WholeExperts> parts() && {
    if (!own_.empty() || parts_.empty()) {
      finish();
    }
    return std::move(parts_);
  }

  bool is_empty() const { return own_.empty(); }
  bool has_rows() const { return row_ > first_row_; }
  int64_t row() const { return row_; }  ///< behind the last
  int64_t finished() const { return static_cast<int64_t>(parts_.size()); }

 private:
  std::vector<WholeExperts> parts_;
  std::vector<int64_t> own_;
  int64_t first_expert_ = 0;
  int64_t first_row_ = 0;
  int64_t row_ = 0;
};

/// Experts in parts of about equal rows.
std::vector<WholeExperts> in_equal_parts(const std::vector<int64_t>& counts, int64_t parts) {
  const int64_t rows = sum(counts);
  Cutting cutting;
  for (const int64_t count : counts) {
    // A new part begins where the ones before it have had their share.
    if (cutting.has_rows() && cutting.row() * parts >= rows * (cutting.finished() + 1)) {
      cutting.finish();
    }
    cutting.take(count);
  }
  return std::move(cutting).parts();
}

/// Every expert by itself, in at most so many pieces of equal rows: first those whose last rows come first.
std::vector<WholeExperts> in_pieces(const std::vector<int64_t>& counts, int64_t most,
                                    const std::vector<RowRange>& chunks) {
  Cutting cutting;
  for (const int64_t count : counts) {
    std::vector<RowRange> pieces;
    const auto number = static_cast<int>(pieces_of(count, most));
    for (int piece = 0; piece < number; ++piece) {
      pieces.push_back(
          {cutting.row() + chunk_begin(count, piece, number), chunk_length(count, piece, number)});
    }
    std::stable_sort(pieces.begin(), pieces.end(), [&](const auto& a, const auto& b) {
      return last_chunk_of(a, chunks) < last_chunk_of(b, chunks);
    });
    cutting.take(count);
    cutting.finish(pieces);
  }
  return std::move(cutting).parts();
}

/// As they come: the experts of a chunk together, one that comes in several chunks in these pieces.
std::vector<WholeExperts> as_in_chunks(const std::vector<int64_t>& counts,
                                       const std::vector<RowRange>& chunks) {
  Cutting cutting;
  for (size_t e = 0; e < counts.size(); ++e) {
    const RowRange rows{cutting.row(), counts[e]};
    std::vector<RowRange> pieces;
    bool ends = false;
    for (const RowRange& chunk : chunks) {
      if (overlap(chunk, rows)) {
        if (chunk.count < rows.count) {
          pieces.push_back(chunk);
        }
        ends = ends || chunk.first + chunk.count == rows.first + rows.count;
      }
    }
    if (!pieces.empty() && !cutting.is_empty()) {
      cutting.finish();
    }
    cutting.take(counts[e]);
    // Experts without rows go with whole ones before them.
    if (!pieces.empty() || (ends && (e + 1 == counts.size() || counts[e + 1] > 0))) {
      cutting.finish(pieces);
    }
  }
  return std::move(cutting).parts();
}

/// On a CPU the same whatever the chunks of an exchange are, and whatever there is room for, since a product may
/// be cut otherwise, and so rounded otherwise, beside other rows; on a GPU one a chunk, where there are several.
std::vector<WholeExperts> parts_of(const ExpertCounts& counts, torch::Device device,
                                   const std::vector<RowRange>& chunks) {
  if (device.is_cpu()) {
    const auto& on_host = counts.on_host();
    const int64_t parts = most_parts(device, sum(on_host));
    const int64_t pieces = most_pieces(parts, counts.experts());
    return pieces > 1 ? in_pieces(on_host, pieces, chunks) : in_equal_parts(on_host, parts);
  }
  if (chunks.size() > 1) {
    return as_in_chunks(counts.on_host(), chunks);
  }
  return {WholeExperts({0, 0, counts.rows(), counts})};
}

/// Where a feed-forward that works through its pieces is in a pipeline.
template <typename Output>
class Turns {
 public:
  Turns(const Pipeline<Output>& pipeline, const std::vector<WholeExperts>& parts)
      : pipeline_(pipeline), pieces_left_(pipeline.chunks.size(), 0) {
    for (const WholeExperts& part : parts) {
      for (const Part& piece : part.pieces) {
        for_each_chunk_of(piece, [&](size_t chunk) { ++pieces_left_[chunk]; });
      }
    }
  }

  /// The first chunk is waited for also for no rows.
  void wait_for(const Part& piece) {
    const int64_t last = std::max<int64_t>(last_chunk_of(piece.range(), pipeline_.chunks), 0);
    while (waited_ < chunks() && waited_ <= static_cast<size_t>(last)) {
      wait_for_next();
    }
  }
  /// Whether a chunk has gone on.
  bool go_on_after(const Part& piece, const Output& output) {
    for_each_chunk_of(piece, [&](size_t chunk) { --pieces_left_[chunk]; });
    const size_t before = gone_;
    for (; gone_ < chunks() && pieces_left_[gone_] == 0; ++gone_) {
      if (waited_ == gone_) {
        wait_for_next();  // for no rows
      }
      pipeline_.go_on(output);
    }
    return gone_ > before;
  }

 private:
  template <typename Visit>
  void for_each_chunk_of(const Part& piece, const Visit& visit) const {
    for (size_t chunk = 0; chunk < chunks(); ++chunk) {
      if (overlap(piece.range(), pipeline_.chunks[chunk])) {
        visit(chunk);
      }
    }
  }
  size_t chunks() const { return pipeline_.chunks.size(); }
  void wait_for_next() {
    pipeline_.wait_for_next();
    ++waited_;
  }

  const Pipeline<Output>& pipeline_;
  std::vector<int64_t> pieces_left_;  ///< of each chunk
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

/// The way upstream of some experts, whose results are written to their places in `gradient`. What the weights'
/// gradients are made of lives until they are.
class PartBackward {
 public:
  /// `hidden` [P, n or 2n], whose gradient takes its place where it may be overwritten; undefined: it is computed
  /// again, of `x`.
  PartBackward(const WholeExperts& part, const FeedForward& expert, const IndexedRows& x,
               const torch::Tensor& hidden, bool overwrite_hidden,
               const torch::Tensor& routing_weights, const ExpertProjections& parameters,
               const WantedGradients& wanted, FeedForwardGradient& gradient)
      : part_(part.all),
        in_pieces_(part.pieces.size() > 1),
        expert_(expert),
        x_(x),
        routing_weights_(part_.rows_of(routing_weights)),
        parameters_(parameters),
        wanted_(wanted),
        gradient_(gradient),
        recomputes_(!hidden.defined()),
        hidden_(recomputes_ ? room(parameters.up.weight.size(1)) : part_.rows_of(hidden)),
        dhidden_(recomputes_ || overwrite_hidden ? hidden_ : at::empty_like(hidden_)) {}

  /// Through the down-projection and the activation.
  void through_down(const Part& piece, const IndexedRows& dy) {
    const auto hidden = piece.rows_within(part_, hidden_);
    if (recomputes_) {
      const auto& up = parameters_.up;
      auto result = hidden;
      project(expert_, piece.take(x_, gathers(expert_, GatheredRows::kForwardX, up)),
              piece.experts_of(up), piece.counts, result);
    }
    const ProductRows dresults = take_dresults(piece, dy);
    const Stage named("anabranch.down.backward");
    const Projection down = piece.experts_of(parameters_.down);
    if (!activated_.defined()) {
      activated_ = room(down.weight.size(2));
    }
    auto drouting_weights = piece.rows_of(gradient_.drouting_weights);
    GroupedGemmEngine::ActivatedGradient activation = {
        piece.rows_within(part_, dhidden_), drouting_weights, piece.rows_within(part_, activated_)};
    expert_.engine->dgrad_activated(dresults, down.weight, piece.counts, expert_.activation, hidden,
                                    piece.rows_within(part_, routing_weights_), activation);
    if (down.bias.defined()) {
      drouting_weights.add_(
          BiasKernels::on(hidden.device()).bias_dot(dresults.rows, down.bias, piece.counts));
    }
  }

  void find_weights() {
    down_weights();
    up_weights();
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

  void up_weights() {
    const Stage named("anabranch.up.backward");
    auto& [dweight, dbias] = gradient_.parameters.up;
    make_room(dweight, parameters_.up.weight, wanted_.up_weight && !wanted_.sums.up.defined());
    make_room(dbias, parameters_.up.bias, wanted_.up_bias);
    if (wanted_.up_weight) {
      weight_gradient(expert_, dhidden_,
                      part_.take(x_, gathers(expert_, GatheredRows::kWgradX, parameters_.up)),
                      part_.counts, part_.experts_of(dweight), part_.experts_of(wanted_.sums.up));
    }
    if (dbias.defined()) {
      part_.experts_of(dbias).copy_(
          BiasKernels::on(dhidden_.device()).bias_gradient(dhidden_, {}, part_.counts));
    }
  }

  void through_up(const Part& piece) {
    const Stage named("anabranch.up.backward");
    const auto& weight = parameters_.up.weight;
    if (!gradient_.dx.defined()) {  // not sooner: another part's rows may have left their memory
      gradient_.dx = on_large_pages(
          at::empty({gradient_.drouting_weights.size(0), weight.size(2)}, weight.options()));
    }
    auto dx = piece.rows_of(gradient_.dx);
    expert_.engine->dgrad(piece.rows_within(part_, dhidden_), piece.experts_of(weight),
                          piece.counts, dx);
  }

 private:
  torch::Tensor room(int64_t columns) const {
    return at::empty({part_.rows, columns}, parameters_.up.weight.options());
  }

  /// A piece's rows of `dy`, which are kept with the others for the weights' gradient.
  ProductRows take_dresults(const Part& piece, const IndexedRows& dy) {
    // Biases read copied rows.
    const bool by_index = !parameters_.down.bias.defined() &&
                          gathers(expert_, GatheredRows::kBackwardDy, parameters_.down);
    if (!in_pieces_ || by_index || !dy.index.defined()) {
      dresults_ = part_.take(dy, by_index);
    } else {
      if (!dresults_.rows.defined()) {
        dresults_ = room(dy.rows.size(1));
      }
      const Stage named("anabranch.permute");
      RowKernels::on(dy.rows.device())
          .gather_rows_into(piece.rows_within(part_, dresults_.rows), dy.rows,
                            piece.rows_of(dy.index));
    }
    return dresults_.index.defined()
               ? ProductRows{dresults_.rows, piece.rows_within(part_, dresults_.index)}
               : ProductRows(piece.rows_within(part_, dresults_.rows));
  }

  Part part_;
  bool in_pieces_;
  const FeedForward& expert_;
  const IndexedRows& x_;
  torch::Tensor routing_weights_;
  const ExpertProjections& parameters_;
  const WantedGradients& wanted_;
  FeedForwardGradient& gradient_;
  bool recomputes_;
  torch::Tensor hidden_;                    ///< [part's rows, n or 2n]
  torch::Tensor dhidden_;                   ///< the same, or hidden itself
  ProductRows dresults_ = torch::Tensor();  ///< [part's rows, h]
  torch::Tensor activated_;                 ///< [part's rows, n]
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
  const auto parts = parts_of(counts, x.rows.device(), pipeline.chunks);
  Turns turns(pipeline, parts);
  const auto compute = [&](const Part& part) {
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
  };
  for (const WholeExperts& experts : parts) {
    std::for_each(experts.pieces.begin(), experts.pieces.end(), compute);
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
  const auto parts = parts_of(counts, x.rows.device(), pipeline.chunks);
  Turns turns(pipeline, parts);
  std::vector<PartBackward> without_weights;
  const auto find_weights = [&] {
    for (PartBackward& part : std::exchange(without_weights, {})) {
      part.find_weights();
    }
  };
  const auto begin = [&](const WholeExperts& part) {
    return PartBackward(part, expert, x, hidden, overwrite_hidden, routing_weights, parameters,
                        wanted, gradient);
  };
  for (const WholeExperts& part : parts) {
    if (!pipeline.weights_last) {
      {
        PartBackward backward = begin(part);
        for (const Part& piece : part.pieces) {
          turns.wait_for(piece);
          backward.through_down(piece, dy);
        }
        backward.find_weights();
        for (const Part& piece : part.pieces) {
          backward.through_up(piece);
        }
      }
      for (const Part& piece : part.pieces) {
        turns.go_on_after(piece, gradient);
      }
      continue;
    }
    bool gone = false;
    without_weights.push_back(begin(part));
    for (const Part& piece : part.pieces) {
      turns.wait_for(piece);
      without_weights.back().through_down(piece, dy);
      without_weights.back().through_up(piece);
      gone = turns.go_on_after(piece, gradient) || gone;
    }
    if (gone) {
      find_weights();
    }
  }
  find_weights();
  return gradient;
}

}  // namespace anabranch
