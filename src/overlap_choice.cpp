#include "overlap_choice.h"

#include <ATen/ops/empty.h>
#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>
#include <utility>

#include "support/cuda/capture.h"
#include "support/check.h"
#include "support/median.h"

namespace anabranch {
namespace {

std::vector<int64_t> degrees_of(const MoEOptions& options) {
  if (options.overlap == "auto") {
    check_input(options.engine != "deterministic",
                "MoEOptions: overlap = 'auto' measures, which engine = 'deterministic' is not to: "
                "expected off, 1, 2, 4 or 8");
    return {0, 1, 2, 4};
  }
  constexpr std::array<std::pair<std::string_view, int64_t>, 5> kDegrees = {
      {{"off", 0}, {"1", 1}, {"2", 2}, {"4", 4}, {"8", 8}}};
  for (const auto& [name, degree] : kDegrees) {
    if (options.overlap == name) return {degree};
  }
  throw InputError(
      c10::str("MoEOptions: overlap = '", options.overlap, "', expected off, 1, 2, 4, 8 or auto"));
}

template <typename Taken>
double median_seconds(const std::vector<Taken>& all) {
  if (all.empty()) return 0;
  std::vector<double> seconds;
  for (const auto& [begin, end] : all) seconds.push_back(end.seconds_since(begin));
  return median(std::move(seconds));
}

}  // namespace

OverlapChoice::OverlapChoice(const MoEOptions& options) {
  for (const int64_t degree : degrees_of(options)) ways_.emplace_back().degree = degree;
}

OverlapChoice::Way OverlapChoice::begin_step(Communicator& communicator, torch::Device device) {
  if (communicator.size() == 1) return {};
  const std::scoped_lock lock(mutex_);
  if (ways_.size() == 1 || is_captured(device)) return {ways_[chosen_].degree, -1};
  const auto count = static_cast<int64_t>(ways_.size());
  const int64_t step = step_++ % kPeriod;
  if (step < kRounds * count) {
    const int64_t place = step % count;
    return {ways_[place].degree, step < count ? -1 : place};
  }
  if (step == kRounds * count) choose(communicator);
  return {ways_[chosen_].degree, -1};
}

std::optional<Moment> OverlapChoice::begin(const Way& way, torch::Device device) {
  return way.place < 0 ? std::nullopt : std::optional<Moment>(std::in_place, device);
}

void OverlapChoice::note(const Way& way, bool backward, std::optional<Moment> begin,
                         torch::Device device) {
  if (!begin) return;
  const std::scoped_lock lock(mutex_);
  auto& measured = ways_[way.place];
  (backward ? measured.backward : measured.forward).push_back({std::move(*begin), Moment(device)});
}

void OverlapChoice::choose(Communicator& communicator) {
  const auto own =
      at::empty({static_cast<int64_t>(ways_.size())}, at::TensorOptions(torch::kFloat64));
  for (size_t place = 0; place < ways_.size(); ++place) {
    auto& [degree, forward, backward] = ways_[place];
    own.data_ptr<double>()[place] = median_seconds(forward) + median_seconds(backward);
    forward.clear();
    backward.clear();
  }
  const auto slowest = std::get<0>(communicator.all_gather(own).max(0)).contiguous();
  const auto* seconds = slowest.const_data_ptr<double>();
  const auto quickest =
      static_cast<size_t>(std::min_element(seconds, seconds + ways_.size()) - seconds);
  chosen_ = seconds[quickest] < (1 - kWorth) * seconds[0] ? quickest : 0;
}

}  // namespace anabranch
