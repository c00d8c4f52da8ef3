#pragma once

#include <anabranch/communicator.h>
#include <anabranch/expert_placement.h>
#include <anabranch/options.h>
#include <anabranch/routing.h>

namespace anabranch {

/// Refuses options that no layer can have (InputError); returns them.
const MoEOptions& checked(const MoEOptions& options);
/// Where the experts of such a layer lie; refuses what it cannot have.
ExpertPlacement placement_of(const MoEOptions& options, int64_t num_ranks);
/// Refuses both, and options that differ between ranks
/// (CommunicationError naming rank and field). Collective. Returns the communicator.
std::shared_ptr<Communicator> agree_on_options(const MoEOptions& options,
                                               std::shared_ptr<Communicator> communicator);

/// InputError unless each of so many ranks may send a row.
void check_receive_rows_limit(const MoEOptions& options, int64_t ranks);

/// `x` [..., h] as contiguous tokens [T, h]. InputError unless it is of the layer's type and device.
torch::Tensor layer_tokens(const torch::Tensor& x, const MoEOptions& options);

/// InputError unless `routing` is for `tokens` tokens of such a layer.
void check_layer_routing(const Routing& routing, int64_t tokens, const MoEOptions& options);

}  // namespace anabranch
