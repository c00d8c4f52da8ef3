#include "exchange/late_refusals.h"

#include <ATen/ops/full.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "support/capture.h"
#include "support/check.h"
#include "support/stream.h"

namespace anabranch {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::weak_ptr<LateRefusals>> alive;

  std::vector<std::shared_ptr<LateRefusals>> all() {
    const std::lock_guard lock(mutex);
    std::erase_if(alive, [](const auto& refusals) { return refusals.expired(); });
    std::vector<std::shared_ptr<LateRefusals>> found;
    for (const auto& refusals : alive) {
      if (auto held = refusals.lock()) found.push_back(std::move(held));
    }
    return found;
  }
};

Registry& registry() {
  static Registry all;
  return all;
}

/// What was there, and −1 in its place.
int64_t take(int64_t& token) { return std::atomic_ref(token).exchange(-1); }

}  // namespace

LateRefusals::LateRefusals(torch::Device device)
    : device_(device), told_(at::full({2}, -1, at::TensorOptions(torch::kInt64)).pin_memory()) {}

std::shared_ptr<LateRefusals> LateRefusals::make(torch::Device device) {
  std::shared_ptr<LateRefusals> made(new LateRefusals(device));
  const std::lock_guard lock(registry().mutex);
  registry().alive.push_back(made);
  return made;
}

void LateRefusals::check() {
  auto* told = told_.data_ptr<int64_t>();
  const int64_t nonfinite = take(told[0]);
  const int64_t invalid = take(told[1]);
  check_input(nonfinite < 0, "routing: the gate of token ", nonfinite,
              " of an earlier step holds NaN or Inf");
  check_input(
      invalid < 0, "routing: expert_ids of token ", invalid,
      " of an earlier step are out of range or twice; errors = at_call says what they were");
}

void check_late_refusals() {
  const auto all = registry().all();
  for (const auto& refusals : all) {
    if (!is_captured(refusals->device())) {
      wait_for_stream(refusals->device());
    }
  }
  for (const auto& refusals : all) {
    refusals->check();
  }
}

}  // namespace anabranch
