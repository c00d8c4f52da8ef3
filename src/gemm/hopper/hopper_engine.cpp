#include "gemm/hopper/hopper_engine.h"

#include "gemm/hopper/gather_choice.h"
#include "gemm/hopper/launch.h"
#include "gemm/hopper/tensor_map.h"
#include "gemm/hopper/tile_choice.h"
#include "gemm/tiles/tile_engine.h"

namespace anabranch {
namespace {

class HopperEngine final : public TileEngine {
 public:
  std::string name() const override { return "hopper"; }
  bool gathers(GatheredRows rows, torch::Dtype dtype, int64_t n, int64_t k) const override {
    return supports(dtype, n, k) && hopper::gains_by_index(rows, n, k);
  }

 private:
  void launch(const tiles::Task& task, const Operands& operands, const tiles::Problem& problem,
              int64_t rows, cudaStream_t stream) override {
    const bool wgrad = task.operation == tiles::Operation::kWgrad;
    hopper::Maps maps;
    if (task.gathered == tiles::Gathered::kA) {
      maps.gathered = indexed(operands.a);
    } else {
      maps.a = hopper::rows_map(operands.a.rows);
    }
    if (task.gathered == tiles::Gathered::kB) {
      maps.gathered = indexed(operands.b);
    } else {
      maps.b = wgrad ? hopper::rows_map(operands.b.rows) : hopper::weight_map(operands.b.rows);
    }
    if (task.epilogue == tiles::Epilogue::kStore) {
      maps.c = wgrad ? hopper::weight_map(operands.c) : hopper::rows_map(operands.c);
    }
    tiles::Problem banded = problem;
    banded.band = hopper::choose_band(task.operation, problem.n, problem.k);
    hopper::launch_grouped_gemm(task, maps, banded, rows, stream);
  }

  static hopper::IndexedRows indexed(const ProductRows& rows) {
    return {tiles::aligned_data(rows.rows), rows.index.const_data_ptr<int64_t>(),
            static_cast<int32_t>(rows.rows.size(1))};
  }
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_hopper_engine() { return std::make_shared<HopperEngine>(); }

bool runs_hopper(torch::Device device) { return compute_capability(device) == 90; }

}  // namespace anabranch
