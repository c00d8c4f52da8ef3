#pragma once

#include <string>

namespace anabranch {

/// Tells this host from others, also from those of the same name: its name, and what its kernel drew when
/// it started.
std::string host_identity();
/// The same for the network it is in, a container's or the host's own: ranks of one network reach each
/// other by its loop device.
std::string network_identity();

}  // namespace anabranch
