#include <anabranch/expert_placement.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <charconv>
#include <set>
#include <string_view>

#include "communicator/chunks.h"
#include "placement/slices.h"
#include "support/check.h"

namespace anabranch {
namespace {

/// Takes what `text` begins with: a number, or one character.
class Reading {
 public:
  explicit Reading(std::string_view text) : rest_(text) {}

  bool ends() const { return rest_.empty(); }
  bool take(char mark) {
    const bool there = !ends() && rest_.front() == mark;
    if (there) rest_.remove_prefix(1);
    return there;
  }
  int64_t number() {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(rest_.begin(), rest_.end(), value);
    check_input(error == std::errc() && rest_.front() != '-', "expected a number before '", rest_,
                "'");
    rest_.remove_prefix(end - rest_.begin());
    return value;
  }
  std::string_view rest() const { return rest_; }

 private:
  std::string_view rest_;
};

std::vector<std::vector<HeldExpert>> read_lists(std::string_view text) {
  Reading reading(text);
  std::vector<std::vector<HeldExpert>> held(1);
  while (!reading.ends()) {
    if (reading.take(';')) {
      held.emplace_back();
      continue;
    }
    check_input(held.back().empty() || reading.take(','), "expected ',' or ';' before '",
                reading.rest(), "'");
    HeldExpert next{reading.number()};
    if (reading.take('/')) {
      next.slice = reading.number();
      check_input(reading.take(':'), "expected ':' before '", reading.rest(), "'");
      next.slices = reading.number();
    }
    held.back().push_back(next);
  }
  return held;
}

}  // namespace

ExpertPlacement ExpertPlacement::parse(const std::string& text, int64_t num_experts,
                                       int64_t num_ranks) {
  const ExpertPlacement blocks{num_experts, num_ranks};
  ExpertPlacement placement = blocks;
  if (text == "sliced") {
    return sliced(num_experts, num_ranks);
  }
  if (text == "movable") {
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
      auto& of_rank = placement.held.emplace_back();
      for (int64_t e = 0; e < blocks.local_experts(rank); ++e)
        of_rank.push_back(blocks.at(rank, e));
    }
  } else if (text != "blocks") {
    try {
      placement.held = read_lists(text);
    } catch (const InputError& error) {
      throw InputError(c10::str(
          "placement = '", text,
          "', expected blocks, sliced, movable or lists as in 0,3;2/0:2;2/1:2,1: ", error.what()));
    }
    check_placement(placement);
  }
  return placement;
}

ExpertPlacement ExpertPlacement::sliced(int64_t num_experts, int64_t num_ranks) {
  ExpertPlacement placement{num_experts, num_ranks};
  if (num_ranks <= num_experts) {
    return placement;
  }
  for (int expert = 0; expert < num_experts; ++expert) {
    const int64_t slices = chunk_length(num_ranks, expert, static_cast<int>(num_experts));
    for (int64_t slice = 0; slice < slices; ++slice) {
      placement.held.push_back({{expert, slice, slices}});
    }
  }
  return placement;
}

int64_t ExpertPlacement::local_experts(int64_t rank) const {
  return is_blocks() ? num_experts / num_ranks + (rank < num_experts % num_ranks ? 1 : 0)
                     : static_cast<int64_t>(held[rank].size());
}

int64_t ExpertPlacement::first_place(int64_t rank) const {
  if (is_blocks()) {
    return rank * (num_experts / num_ranks) + std::min(rank, num_experts % num_ranks);
  }
  int64_t first = 0;
  for (int64_t before = 0; before < rank; ++before) first += local_experts(before);
  return first;
}

int64_t ExpertPlacement::rank_of(int64_t place) const {
  int64_t rank = 0;
  for (int64_t end = local_experts(0); end <= place; end += local_experts(rank)) ++rank;
  return rank;
}

std::vector<HeldExpert> ExpertPlacement::all() const {
  std::vector<HeldExpert> places;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    for (int64_t local = 0; local < local_experts(rank); ++local) {
      places.push_back(at(rank, local));
    }
  }
  return places;
}

int64_t ExpertPlacement::most_slices() const {
  int64_t most = 1;
  for (const auto& of_rank : held) {
    for (const auto& [expert, slice, slices] : of_rank) most = std::max(most, slices);
  }
  return most;
}

std::string ExpertPlacement::describe() const {
  if (is_blocks()) {
    return "blocks";
  }
  std::string text;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    text += rank > 0 ? ";" : "";
    for (int64_t local = 0; local < local_experts(rank); ++local) {
      const auto& [expert, slice, slices] = held[rank][local];
      text += c10::str(local > 0 ? "," : "", expert);
      text += slices > 1 ? c10::str("/", slice, ":", slices) : "";
    }
  }
  return text;
}

std::vector<int64_t> ExpertPlacement::place_of_experts() const {
  std::vector<int64_t> places(num_experts);
  int64_t place = 0;
  for (const auto& [expert, slice, slices] : all()) {
    if (slice == 0) places[expert] = place;
    ++place;
  }
  return places;
}

namespace {

void check_rank(const ExpertPlacement& placement, int64_t rank) {
  std::set<int64_t> experts;
  for (const auto& [expert, slice, slices] : placement.held[rank]) {
    check_input(expert >= 0 && expert < placement.num_experts && slices >= 1 && slice >= 0 &&
                    slice < slices,
                "placement: rank ", rank, " holds slice ", slice, " of ", slices, " of expert ",
                expert, ", where there are ", placement.num_experts, " experts");
    check_input(experts.insert(expert).second, "placement: rank ", rank, " holds expert ", expert,
                " twice");
  }
}

}  // namespace

void check_placement(const ExpertPlacement& placement) {
  if (placement.is_blocks()) {
    return;
  }
  check_input(static_cast<int64_t>(placement.held.size()) == placement.num_ranks, "placement: of ",
              placement.held.size(), " ranks, expected ", placement.num_ranks);
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) check_rank(placement, rank);
  std::vector<std::vector<HeldExpert>> of_expert(placement.num_experts);
  for (const HeldExpert& held : placement.all()) of_expert[held.expert].push_back(held);
  for (int64_t expert = 0; expert < placement.num_experts; ++expert) {
    auto& found = of_expert[expert];
    std::sort(found.begin(), found.end(),
              [](const auto& one, const auto& other) { return one.slice < other.slice; });
    bool once = !found.empty();
    for (size_t slice = 0; slice < found.size(); ++slice) {
      once = once && found[slice] == HeldExpert{expert, static_cast<int64_t>(slice),
                                                static_cast<int64_t>(found.size())};
    }
    check_input(once, "placement: expert ", expert,
                " is not there exactly once, whole or in all its slices: ", placement.describe());
  }
}

void check_slices(const ExpertPlacement& placement, int64_t expert_hidden_size) {
  if (placement.is_blocks()) {
    return;
  }
  check_input(placement.most_slices() <= expert_hidden_size, "placement: ", placement.most_slices(),
              " slices of an expert of hidden size ", expert_hidden_size);
  for (int64_t rank = 0; rank < placement.num_ranks; ++rank) {
    for (int64_t local = 1; local < placement.local_experts(rank); ++local) {
      const HeldExpert held = placement.at(rank, local);
      const HeldExpert first = placement.at(rank, 0);
      check_input(slice_width(expert_hidden_size, held) == slice_width(expert_hidden_size, first),
                  "placement: rank ", rank, " holds slices of experts ", first.expert, " and ",
                  held.expert, " of different widths, which one grouped GEMM does not multiply");
    }
  }
}

}  // namespace anabranch
