#pragma once

#include <anabranch/exchange.h>

#include <memory>
#include <vector>

#include "exchange/arrivals.h"
#include "exchange/late_refusals.h"

namespace anabranch {

/// For `capacity` times as many assignments as this rank's own tokens have, which is the balanced load
/// where all ranks have as many, and for no more than any routing brings then.
Room room_for(double capacity, int64_t tokens, int64_t top_k, const ExpertPlacement& placement,
              int64_t rank);

/// A plan whose counts stay on the device and whose buffers are as large as `room`. `head`, in parts, is this
/// rank's of Told; `to_all` [W] are zeros; `source_counts` as of PendingPlan; `first_place` [W+1]. Where any rank
/// refuses its routing, has another form, or would receive more than it has room for, no row moves,
/// `ExchangePlan::spoilt` says so on every rank, and `late` is told. Collective.
PendingPlan begin_plan_within(const Room& room, Departures own, std::vector<torch::Tensor> head,
                              const torch::Tensor& to_all, const torch::Tensor& source_counts,
                              const torch::Tensor& first_place, const ExpertPlacement& placement,
                              std::shared_ptr<Communicator> communicator, const LateRefusals& late);

}  // namespace anabranch
