#include "checkpoint/stored_experts.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include "placement/holder.h"
#include "placement/slices.h"
#include "support/sum.h"

namespace anabranch {
namespace {

/// A place, and who writes what it has.
struct Source {
  HeldExpert held;
  int64_t writer;
  int64_t place;
};

std::vector<Source> sources_of(const ParallelParameter& tensor, const ParallelGroups& groups) {
  const auto placement = tensor.placement_over(groups.expert_parallel->size());
  std::vector<Source> sources;
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    for (int64_t local = 0; local < placement.local_experts(rank); ++local) {
      sources.push_back({placement.at(rank, local),
                         holder_of(tensor, placement, rank, local, /*group=*/0, groups),
                         static_cast<int64_t>(sources.size())});
    }
  }
  return sources;
}

/// Slices on their way to the rank that writes their expert.
class Gathering {
 public:
  Gathering(const ParallelParameter& tensor, const std::vector<Source>& sources,
            const std::vector<int64_t>& writers, const ParallelGroups& groups)
      : tensor_(tensor), sources_(sources), writers_(writers), world_(*groups.world) {}

  /// Into the `wholes` [E] of this rank's experts. Collective.
  void run(std::vector<torch::Tensor>& wholes) const {
    const int64_t rank = world_.rank();
    std::vector<torch::Tensor> pieces = {at::empty({0}, tensor_.tensor.options())};
    std::vector<int64_t> to(world_.size(), 0), from(world_.size(), 0);
    for (int64_t other = 0; other < world_.size(); ++other) {
      for (const Source& source : sources_) {
        if (source.writer != rank || writers_[source.held.expert] != other) continue;
        pieces.push_back(part(source).flatten());
        to[other] += pieces.back().numel();
      }
    }
    for (const Source& source : sources_) {
      if (writers_[source.held.expert] == rank) from[source.writer] += length(source);
    }
    auto received = at::empty({sum(from)}, tensor_.tensor.options());
    world_.all_to_all_v({{at::cat(pieces), to, received, from}});
    int64_t next = 0;
    for (int64_t other = 0; other < world_.size(); ++other) {
      for (const Source& source : sources_) {
        if (source.writer != other || writers_[source.held.expert] != rank) continue;
        const auto piece = received.narrow(0, next, length(source));
        copy_into_whole(wholes[source.held.expert], piece, source.held, tensor_.cut);
        next += piece.numel();
      }
    }
  }

 private:
  torch::Tensor part(const Source& source) const {
    return tensor_.tensor[source.place - tensor_.first_place];
  }
  /// Numbers of a place's part.
  int64_t length(const Source& source) const {
    const auto whole = whole_sizes(tensor_.tensor.sizes().slice(1), tensor_.cut);
    const int64_t count = c10::multiply_integers(whole);
    if (tensor_.cut.dimension < 0) return count;
    const auto& [dimension, parts, size] = tensor_.cut;
    return count / size * parts * slice_width(size / parts, source.held);
  }

  const ParallelParameter& tensor_;
  const std::vector<Source>& sources_;
  const std::vector<int64_t>& writers_;
  Communicator& world_;
};

}  // namespace

std::vector<StoredExpert> stored_experts(const ParallelParameter& tensor,
                                         const ParallelGroups& groups) {
  const auto sources = sources_of(tensor, groups);
  std::vector<int64_t> writers(tensor.num_experts);
  std::vector<torch::Tensor> wholes(tensor.num_experts);
  const auto sizes = whole_sizes(tensor.tensor.sizes().slice(1), tensor.cut);
  for (const auto& [held, writer, place] : sources) {
    if (held.slice > 0) continue;
    writers[held.expert] = writer;
    if (writer != groups.world->rank()) continue;
    wholes[held.expert] = tensor.in_slices() ? at::empty(sizes, tensor.tensor.options())
                                             : tensor.tensor[place - tensor.first_place];
  }
  if (tensor.in_slices()) {
    Gathering(tensor, sources, writers, groups).run(wholes);
  }
  std::vector<StoredExpert> experts;
  for (int64_t expert = 0; expert < tensor.num_experts; ++expert) {
    experts.push_back({expert, writers[expert], wholes[expert]});
  }
  return experts;
}

}  // namespace anabranch
