#include "communicator/nccl/family.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace anabranch {
namespace {

std::vector<int> all_ranks(int size) {
  std::vector<int> ranks(size);
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

}  // namespace

NcclFamily::NcclFamily(std::shared_ptr<Shared> shared, std::vector<int> ranks)
    : shared_(std::move(shared)), ranks_(std::move(ranks)) {}

NcclFamily::NcclFamily(int size) : NcclFamily(std::make_shared<Shared>(), all_ranks(size)) {}

NcclFamily NcclFamily::split(const std::vector<int>& members) const {
  std::vector<int> ranks;
  for (const int member : members) ranks.push_back(ranks_.at(member));
  return {shared_, std::move(ranks)};
}

void NcclFamily::report(const NcclFailure& failure) const {
  NcclFailure of_all{failure.text, {}};
  for (const int culprit : failure.culprits) of_all.culprits.push_back(ranks_.at(culprit));
  const std::lock_guard lock(shared_->mutex);
  if (!shared_->failure.has_value()) shared_->failure = std::move(of_all);
}

std::optional<NcclFailure> NcclFamily::failure() const {
  const std::lock_guard lock(shared_->mutex);
  if (!shared_->failure.has_value()) return std::nullopt;
  NcclFailure failure{shared_->failure->text, {}};
  for (const int culprit : shared_->failure->culprits) {
    const auto found = std::find(ranks_.begin(), ranks_.end(), culprit);
    if (found != ranks_.end()) {
      failure.culprits.push_back(static_cast<int>(found - ranks_.begin()));
    }
  }
  return failure;
}

}  // namespace anabranch
