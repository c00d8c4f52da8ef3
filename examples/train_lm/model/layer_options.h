#pragma once

#include <anabranch/options.h>

#include <map>
#include <string>

#include "options.h"

namespace train_lm {

// What the library's enumerations are called on the command line: as in its other languages and files.
const std::map<std::string, anabranch::Gate>& gates();
const std::map<std::string, anabranch::RouterScore>& router_scores();
const std::map<std::string, anabranch::BiasUpdate>& bias_updates();
const std::map<std::string, anabranch::GroupScore>& group_scores();
const std::map<std::string, anabranch::ForcedRouting>& forced_routings();

/// Of the experts of a layer.
anabranch::MoEOptions layer_options(const Options& options, int64_t layer);

/// Throws std::invalid_argument where the library has no such layer.
void check_layer(const Options& options);

/// Whether routers draw random numbers in training.
bool routers_draw(const Options& options);

}  // namespace train_lm
