#pragma once

#include <anabranch/exchange.h>

#include "kernels/plan.h"

namespace anabranch {

// Stages of what travels between ranks, within others: from when it sets out until it is known to have come, chunks
// and what is under way at the same time as one; and of that, while nothing else is done.
constexpr const char* kUnderWay = "anabranch.exchange";
constexpr const char* kExposed = "anabranch.exchange.exposed";

/// A step's own part of a plan: all that is known without another rank.
struct Departures {
  torch::Tensor ids;  ///< [T, top_k]
  SendPlan send;
  torch::Tensor weights;  ///< [T·top_k] in the order of send.send_order
};

/// What a rank receives in a step, or has room for where its host does not know.
struct Room {
  int64_t rows = 0;
  int64_t assignments = 0;
};

/// Of a plan's lists of counts on the device, see ExchangePlan, what a transfer to the experts reads, and one back;
/// undefined as they are.
torch::Tensor there(const torch::Tensor& counts);
torch::Tensor back(const torch::Tensor& counts);

/// The expert side of `plan`, of which counts and the source side are there: what it is made of is exchanged,
/// with the routing's weights and, where they are defined, `rows` [T, h], which it returns at the experts.
/// `ends` are those of what arrives within `room`. Collective.
torch::Tensor receive_into(ExchangePlan& plan, const Departures& own, const torch::Tensor& rows,
                           const ArrivalEnds& ends, const Room& room, Communicator& communicator);

}  // namespace anabranch
