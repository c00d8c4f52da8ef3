// What a build without MPI, NCCL and CUDA says. Its stubs stand before the library here, which is built with
// whatever this machine has.
#include <anabranch/communicator.h>
#include <anabranch/error.h>
#include <anabranch/moe_layer.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>

#include "communicator/describe.h"
#include "gemm/ampere/ampere_engine.h"
#include "gemm/auto/measuring.h"
#include "gemm/cublas/cublas_engines.h"
#include "gemm/hopper/hopper_engine.h"
#include "kernels/activation.h"
#include "kernels/bias.h"
#include "kernels/gate.h"
#include "kernels/plan.h"
#include "kernels/routing.h"
#include "kernels/rows.h"
#include "support/cuda/to_gpu.h"

namespace anabranch::test {
namespace {

const torch::Device kGpu(torch::kCUDA, 0);

void expect_not_built(const std::function<void()>& call, const std::string& what) {
  try {
    call();
    ADD_FAILURE() << what << ": nothing was thrown";
  } catch (const NotBuiltError& error) {
    EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
  }
}

TEST(NotBuilt, Communicators) {
  expect_not_built([] { make_mpi_communicator(); }, "has no MPI");
  const auto alone = make_self_communicator();
  expect_not_built([&] { make_nccl_communicator(alone, kGpu); }, "has no NCCL");
  expect_not_built([] { make_nccl_communicator("id", 0, 1, kGpu); }, "has no NCCL");
  expect_not_built([] { make_nccl_unique_id(); }, "has no NCCL");
  EXPECT_EQ(describe_mpi(), "MPI: not built");
  EXPECT_EQ(describe_nccl(), "NCCL: not built");
}

TEST(NotBuilt, Engines) {
  EXPECT_TRUE(grouped_gemm_engines(kGpu).empty());
  for (const std::string name : {"auto", "deterministic", "hopper"}) {
    expect_not_built([&] { make_grouped_gemm_engine(kGpu, name); }, "needs a build");
  }
  expect_not_built([] { make_cublas_loop_engine(kGpu, 1); }, "no cuBLAS");
  expect_not_built([] { make_cublas_grouped_engine(kGpu); }, "no cuBLAS");
  expect_not_built([] { make_cublaslt_grouped_engine(kGpu); }, "no cuBLAS");
  expect_not_built([] { make_hopper_engine(); }, "no kernels for a GPU");
  expect_not_built([] { make_ampere_engine(); }, "no kernels for a GPU");
  expect_not_built([] { gpu_milliseconds([] {}); }, "no CUDA");
}

TEST(NotBuilt, Kernels) {
  for (const auto& cuda : std::initializer_list<std::function<void()>>{
           [] { ActivationKernels::cuda(); }, [] { BiasKernels::cuda(); },
           [] { GateKernels::cuda(); }, [] { PlanKernels::cuda(); }, [] { RoutingKernels::cuda(); },
           [] { RowKernels::cuda(); }, [] { to_gpu({1}, kGpu); }}) {
    expect_not_built(cuda, "need a build of anabranch with CUDA");
  }
}

TEST(NotBuilt, ALayerOnAGpu) {
  MoEOptions options;
  options.hidden_size = 8;
  options.expert_hidden_size = 8;
  options.num_experts = 2;
  options.device = kGpu;
  expect_not_built([&] { MoELayer layer(options); }, "needs a build of anabranch with CUDA");
}

}  // namespace
}  // namespace anabranch::test
