#include <anabranch/expert_counts.h>

#include <ATen/ops/diff.h>

#include <algorithm>
#include <numeric>

#include "support/cuda/to_gpu.h"

namespace anabranch {
namespace {

std::vector<int64_t> first_rows(const std::vector<int64_t>& counts) {
  std::vector<int64_t> first_row = {0};
  for (const int64_t count : counts) {
    first_row.push_back(first_row.back() + count);
  }
  return first_row;
}

std::vector<int64_t> longest_first(const std::vector<int64_t>& counts) {
  std::vector<int64_t> experts(counts.size());
  std::iota(experts.begin(), experts.end(), 0);
  std::stable_sort(experts.begin(), experts.end(),
                   [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
  return experts;
}

}  // namespace

struct ExpertCounts::State {
  int64_t experts = 0;
  int64_t rows = 0;
  bool known_to_host = false;
  std::vector<int64_t> on_host;
  OnDevice on_device;
};

ExpertCounts::ExpertCounts(std::vector<int64_t> counts) : state_(std::make_shared<State>()) {
  state_->experts = static_cast<int64_t>(counts.size());
  // What overflows is refused where it is used, and must not be undefined here.
  state_->rows = static_cast<int64_t>(std::accumulate(counts.begin(), counts.end(), uint64_t{0}));
  state_->known_to_host = true;
  state_->on_host = std::move(counts);
}

ExpertCounts::ExpertCounts(OnDevice counts, int64_t rows) : state_(std::make_shared<State>()) {
  state_->experts = counts.longest_first.size(0);
  state_->rows = rows;
  state_->on_device = std::move(counts);
}

int64_t ExpertCounts::experts() const { return state_->experts; }
int64_t ExpertCounts::rows() const { return state_->rows; }
bool ExpertCounts::known_to_host() const { return state_->known_to_host; }

const std::vector<int64_t>& ExpertCounts::on_host() const {
  if (!state_->known_to_host) {
    const auto counts = state_->on_device.first_row.diff().cpu();
    const auto* begin = counts.const_data_ptr<int64_t>();
    state_->on_host.assign(begin, begin + counts.numel());
    state_->known_to_host = true;
  }
  return state_->on_host;
}

const ExpertCounts::OnDevice& ExpertCounts::on(torch::Device device) const {
  auto& known = state_->on_device;
  if (!known.first_row.defined() || known.first_row.device() != device) {
    // Both in one copy.
    auto values = first_rows(on_host());
    const auto order = longest_first(on_host());
    values.insert(values.end(), order.begin(), order.end());
    const auto copied = to_gpu(values, device);
    known = {copied.narrow(0, 0, experts() + 1), copied.narrow(0, experts() + 1, experts())};
  }
  return known;
}

}  // namespace anabranch
