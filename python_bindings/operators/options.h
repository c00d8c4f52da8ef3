#pragma once

#include <anabranch/options.h>

#include <string>

namespace anabranch::operators {

/// The options that a JSON object names: members of MoEOptions by their names, but for dtype and
/// device. What it does not name has its default. InputError for other members and other types.
MoEOptions options_from_json(const std::string& json);

}  // namespace anabranch::operators
