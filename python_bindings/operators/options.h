#pragma once

#include <anabranch/options.h>

#include <string>

namespace anabranch::operators {

/// The options that a JSON object names: members of MoEOptions by their names, but for dtype and
/// device. What it does not name has its default. InputError for other members and other types.
MoEOptions options_from_json(const std::string& json);

/// Every member of MoEOptions with its default, as a JSON object; null for dtype and device.
std::string default_options();

}  // namespace anabranch::operators
