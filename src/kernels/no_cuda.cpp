#include <anabranch/error.h>

#include "kernels/activation.h"
#include "kernels/bias.h"
#include "kernels/gate.h"
#include "kernels/optimizer.h"
#include "kernels/plan.h"
#include "kernels/routing.h"
#include "kernels/rows.h"

// Built in the place of cuda/ where there is no CUDA.
namespace anabranch {
namespace {

[[noreturn]] void refuse() {
  throw NotBuiltError("tensors on a GPU need a build of anabranch with CUDA (ANABRANCH_CUDA=ON)");
}

}  // namespace

const ActivationKernels& ActivationKernels::cuda() { refuse(); }
const BiasKernels& BiasKernels::cuda() { refuse(); }
const GateKernels& GateKernels::cuda() { refuse(); }
const OptimizerKernels& OptimizerKernels::cuda() { refuse(); }
const PlanKernels& PlanKernels::cuda() { refuse(); }
const RoutingKernels& RoutingKernels::cuda() { refuse(); }
const RowKernels& RowKernels::cuda() { refuse(); }

}  // namespace anabranch
