#pragma once

// The whole library, in the order of its story.
#include <anabranch/options.h>
#include <anabranch/routing.h>
#include <anabranch/router.h>
#include <anabranch/expert_placement.h>
#include <anabranch/rank_discovery.h>
#include <anabranch/communicator.h>
#include <anabranch/agreement.h>
#include <anabranch/hierarchical.h>
#include <anabranch/process_group.h>
#include <anabranch/exchange.h>
#include <anabranch/grouped_gemm.h>
#include <anabranch/experts.h>
#include <anabranch/moe_layer.h>
#include <anabranch/memory_plan.h>
#include <anabranch/parameters.h>
#include <anabranch/gradients.h>
#include <anabranch/gradient_reducer.h>
#include <anabranch/optimizers.h>
#include <anabranch/expert_mover.h>
#include <anabranch/checkpoint.h>
#include <anabranch/safetensors.h>
#include <anabranch/error.h>
