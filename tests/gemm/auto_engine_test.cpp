// What auto does on a GPU beyond what every engine does: see grouped_gemm_test.
#include <ATen/cuda/CUDAContextLight.h>
#include <anabranch/grouped_gemm.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <gtest/gtest.h>

#include "support/devices.h"
#include "support/random.h"
#include "support/tolerance.h"
#include "support/world.h"

namespace anabranch::test {
namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

/// So many bytes of the GPU's memory can be had while it lives, and no more.
class MemoryLimit {
 public:
  explicit MemoryLimit(int64_t bytes) {
    allocator::emptyCache();
    const auto taken = allocator::getDeviceStats(device().index()).reserved_bytes[0].current;
    const auto all = at::cuda::getDeviceProperties(device().index())->totalGlobalMem;
    allocator::setMemoryFraction(static_cast<double>(taken + bytes) / static_cast<double>(all),
                                 device().index());
  }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;
  ~MemoryLimit() { allocator::setMemoryFraction(1, device().index()); }
};

// The gradient may be written over what it is computed from. To measure that takes memory beyond what the
// product needs: engines that find none are left out, and where none finds any, auto guesses.
TEST(AutoEngine, NeedsNoMemoryOfItsOwn) {
  Random random(test_seed());
  const auto* properties = at::cuda::getDeviceProperties(device().index());
  if (properties->major != 9) {
    GTEST_SKIP() << "the engines but hopper need as much memory themselves";
  }
  constexpr int64_t kRows = 1 << 14;
  const auto options = torch::TensorOptions(torch::kBFloat16).device(device());
  const std::vector<int64_t> counts = {kRows - 1000, 1000};
  for (const auto& [allowance, says] : {std::pair(0.5, "hopper (; the others"), {1.5, " ms"}}) {
    // Sizes that no run before has measured and written down.
    const int64_t width = 4096 + 8 * random.integer(1, 400);
    const int64_t inner = 8 * random.integer(8, 40);
    const auto dy = random.normal({kRows, inner}, torch::kBFloat16);
    const auto weight = random.normal({2, inner, width}, torch::kBFloat16);
    const auto before = random.normal({kRows, width}, torch::kBFloat16);
    const auto dy_device = dy.to(options);
    const auto weight_device = weight.to(options);
    GroupedGemmEngine::ActivatedGradient gradient = {
        before.to(options), torch::empty({kRows}, options.dtype(torch::kFloat)),
        torch::empty({kRows, width}, options)};
    const auto engine = make_grouped_gemm_engine(device());
    {
      const MemoryLimit limit(static_cast<int64_t>(allowance * gradient.dhidden.nbytes()));
      engine->dgrad_activated(dy_device, weight_device, counts, {Activation::kSilu, /*glu=*/false},
                              gradient.dhidden, {}, gradient);
    }
    const std::string explained = engine->explain();
    const auto line = explained.substr(explained.find(c10::str("2 experts ", inner, " x ", width)));
    EXPECT_NE(line.substr(0, line.find('\n')).find(says), std::string::npos) << explained;

    // Every row is written; some of both experts are compared: all of them would take a CPU minutes.
    EXPECT_TRUE(gradient.dhidden.isfinite().all().item<bool>());
    const auto of_first = torch::arange(0, counts[0], 80);
    const auto of_second = torch::arange(counts[0], kRows, 40);
    const auto some = torch::cat({of_first, of_second});
    const auto some_dy = dy.index_select(0, some).to(torch::kFloat64);
    const auto weight64 = weight.to(torch::kFloat64);
    const auto product = [&](const torch::Tensor& rows, const torch::Tensor& weights) {
      const auto parts = rows.split_with_sizes({of_first.numel(), of_second.numel()});
      return torch::cat({parts[0].mm(weights[0]), parts[1].mm(weights[1])});
    };
    const auto hidden = before.index_select(0, some).to(torch::kFloat64).requires_grad_();
    torch::silu(hidden).backward(product(some_dy, weight64));
    // No slope is larger than 1.2.
    const auto magnitude = 1.2 * product(some_dy.abs(), weight64.abs()) + 1e-3;
    EXPECT_TRUE(close(gradient.dhidden.cpu().index_select(0, some), hidden.grad(),
                      tolerance(torch::kBFloat16, inner + 16, magnitude, 3)));
  }
}

}  // namespace
}  // namespace anabranch::test
