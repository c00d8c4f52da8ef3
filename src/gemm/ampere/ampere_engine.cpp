#include "gemm/ampere/ampere_engine.h"

#include "gemm/ampere/launch.h"
#include "gemm/tiles/tile_engine.h"

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
    ampere::launch_grouped_gemm(task, banded, source(operands.a), source(operands.b),
                                operands.c.defined() ? operands.c.mutable_data_ptr() : nullptr,
                                stream);
  }

  static ampere::Source source(const ProductRows& rows) {
    return {tiles::aligned_data(rows.rows),
            rows.index.defined() ? rows.index.const_data_ptr<int64_t>() : nullptr};
  }
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_ampere_engine() { return std::make_shared<AmpereEngine>(); }

bool runs_ampere(torch::Device device) { return compute_capability(device) >= 80; }

}  // namespace anabranch
