#include "gemm/ampere/ampere_engine.h"

#include "gemm/ampere/launch.h"
#include "gemm/tiles/tile_engine.h"
#include "support/check.h"

namespace anabranch {
namespace {

class AmpereEngine final : public TileEngine {
 public:
  std::string name() const override { return "ampere"; }

 private:
  void launch(const tiles::Task& task, const Operands& operands, const tiles::Problem& problem,
              int64_t /*rows*/, cudaStream_t stream) override {
    constexpr int32_t kBand = 8;
    tiles::Problem banded = problem;
    banded.band = kBand;
    ampere::launch_grouped_gemm(task, banded, aligned(operands.a), aligned(operands.b),
                                operands.c.defined() ? operands.c.mutable_data_ptr() : nullptr,
                                stream);
  }

  static const void* aligned(const torch::Tensor& tensor) {
    const void* const data = tensor.const_data_ptr();
    check_input(reinterpret_cast<uintptr_t>(data) % 16 == 0,
                "grouped GEMM: the data of a tensor of shape ", tensor.sizes(),
                " does not begin at a multiple of 16 bytes");
    return data;
  }
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_ampere_engine() { return std::make_shared<AmpereEngine>(); }

bool runs_ampere(torch::Device device) { return compute_capability(device) >= 80; }

}  // namespace anabranch
