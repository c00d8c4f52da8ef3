#pragma once

#include <anabranch/routing.h>

namespace anabranch {

RoutingRule routing_rule(const MoEOptions& options);

/// Throws InputError, which begins with `where`, unless `rule` can route to `experts` experts.
void check_rule(const RoutingRule& rule, int64_t experts, const char* where);

}  // namespace anabranch
