#pragma once

#include <anabranch/moe_layer.h>

#include <memory>
#include <string>

namespace anabranch::operators {

// Operators take tensors, numbers and strings. So a communicator has a name here, and a layer is its
// options and the name of its communicator.

/// Keeps `communicator` under `name`, in place of what had it, until `release_group`; returns `name`.
std::string register_group(const std::string& name, std::shared_ptr<Communicator> communicator);
/// Forgets the communicator, and the layers over it.
void release_group(const std::string& name);
/// InputError where there is none of that name.
std::shared_ptr<Communicator> group_named(const std::string& name);

/// The layer of these options (see options_from_json) over that group, made once.
std::shared_ptr<const MoEFunction> function_for(const std::string& options,
                                                const std::string& group, torch::Dtype dtype,
                                                torch::Device device);
/// The exchange of tokens for so many experts over that group, made once.
std::shared_ptr<const Exchange> exchange_for(const std::string& group, int64_t num_experts);
/// The engine of that name, made once for a device.
std::shared_ptr<GroupedGemmEngine> engine_for(torch::Device device, const std::string& name);

}  // namespace anabranch::operators
