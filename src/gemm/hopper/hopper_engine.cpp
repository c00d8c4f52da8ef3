#include "gemm/hopper/hopper_engine.h"

#include "gemm/hopper/launch.h"
#include "gemm/hopper/tensor_map.h"
#include "gemm/hopper/tile_choice.h"
#include "gemm/tiles/tile_engine.h"

namespace anabranch {
namespace {

class HopperEngine final : public TileEngine {
 public:
  std::string name() const override { return "hopper"; }

 private:
  void launch(const tiles::Task& task, const Operands& operands, const tiles::Problem& problem,
              int64_t rows, cudaStream_t stream) override {
    const bool wgrad = task.operation == tiles::Operation::kWgrad;
    hopper::Maps maps = {
        hopper::rows_map(operands.a),
        wgrad ? hopper::rows_map(operands.b) : hopper::weight_map(operands.b),
    };
    if (task.epilogue == tiles::Epilogue::kStore) {
      maps.c = wgrad ? hopper::weight_map(operands.c) : hopper::rows_map(operands.c);
    }
    tiles::Problem banded = problem;
    banded.band = hopper::choose_band(task.operation, problem.n, problem.k);
    hopper::launch_grouped_gemm(task, maps, banded, rows, stream);
  }
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_hopper_engine() { return std::make_shared<HopperEngine>(); }

bool runs_hopper(torch::Device device) { return compute_capability(device) == 90; }

}  // namespace anabranch
