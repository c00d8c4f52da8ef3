#include "exchange/late_refusals.h"

#include <ATen/ops/full.h>
#include <anabranch/error.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "support/cuda/capture.h"
#include "support/check.h"
#include "support/cuda/stream.h"

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

enum RefusalPlace : int64_t { kNonfinite, kInvalid, kPeer, kExceeded };

/// What was there, and −1 in its place.
int64_t take(int64_t& token) { return std::atomic_ref(token).exchange(-1); }

}  // namespace

LateRefusals::LateRefusals(torch::Device device)
    : device_(device), told_(at::full({4}, -1, at::TensorOptions(torch::kInt64))) {
  if (device.is_cuda()) {
    told_ = told_.pin_memory();
  }
}

std::shared_ptr<LateRefusals> LateRefusals::for_device(torch::Device device,
                                                       std::shared_ptr<LateRefusals> known) {
  if (known != nullptr && known->device() == device) {
    return known;
  }
  std::shared_ptr<LateRefusals> made(new LateRefusals(device));
  const std::lock_guard lock(registry().mutex);
  registry().alive.push_back(made);
  return made;
}

void LateRefusals::check() {
  auto* told = told_.data_ptr<int64_t>();
  const int64_t nonfinite = take(told[kNonfinite]);
  const int64_t invalid = take(told[kInvalid]);
  const int64_t peer = take(told[kPeer]);
  const int64_t exceeded = take(told[kExceeded]);
  check_input(nonfinite < 0, "routing: the gate of token ", nonfinite,
              " of an earlier step holds NaN or Inf");
  check_input(
      invalid < 0, "routing: expert_ids of token ", invalid,
      " of an earlier step are out of range or twice; errors = at_call says what they were");
  if (peer >= 0) {
    throw CommunicationError(
        c10::str("rank ", peer,
                 " refused its routing in an earlier step, or takes part in another way"),
        {static_cast<int>(peer)});
  }
  if (exceeded >= 0) {
    throw CapacityError(
        "in an earlier step a rank was to receive more than its receive_capacity has room for: "
        "nothing of "
        "it was computed, its output is NaN; run() does such a step again");
  }
}

bool LateRefusals::take_exceeded() { return take(told_.data_ptr<int64_t>()[kExceeded]) >= 0; }

namespace {

/// Those of all layers, when all that can have been told has been.
std::vector<std::shared_ptr<LateRefusals>> all_told() {
  auto all = registry().all();
  for (const auto& refusals : all) {
    if (!is_captured(refusals->device())) {
      wait_for_stream(refusals->device());
    }
  }
  return all;
}

}  // namespace

void check_late_refusals() {
  for (const auto& refusals : all_told()) {
    refusals->check();
  }
}

bool take_exceeded_rooms() {
  bool exceeded = false;
  for (const auto& refusals : all_told()) {
    exceeded = refusals->take_exceeded() || exceeded;
    refusals->check();
  }
  return exceeded;
}

}  // namespace anabranch
