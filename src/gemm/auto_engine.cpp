#include "gemm/auto_engine.h"

#include "gemm/cublas_loop.h"
#include "gemm/hopper_engine.h"

namespace anabranch {
namespace {

class AutoEngine final : public GroupedGemmEngine {
 public:
  explicit AutoEngine(torch::Device device) : general_(make_cublas_loop_engine(device, 4)) {
    if (is_hopper(device)) {
      hopper_ = make_hopper_engine();
    }
  }

  std::string name() const override { return "auto"; }

  void forward(const torch::Tensor& x, const torch::Tensor& weight,
               const std::vector<int64_t>& counts, torch::Tensor& y) override {
    best_for(weight).forward(x, weight, counts, y);
  }
  void dgrad(const torch::Tensor& dy, const torch::Tensor& weight,
             const std::vector<int64_t>& counts, torch::Tensor& dx) override {
    best_for(weight).dgrad(dy, weight, counts, dx);
  }
  void wgrad(const torch::Tensor& dy, const torch::Tensor& x, const std::vector<int64_t>& counts,
             torch::Tensor& dweight) override {
    best_for(dweight).wgrad(dy, x, counts, dweight);
  }
  torch::Tensor forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                  const std::vector<int64_t>& counts,
                                  const HiddenActivation& activation,
                                  torch::Tensor& hidden) override {
    return best_for(weight).forward_activated(x, weight, counts, activation, hidden);
  }
  void dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                       const std::vector<int64_t>& counts, const HiddenActivation& activation,
                       const torch::Tensor& hidden, const torch::Tensor& values,
                       ActivatedGradient& gradient) override {
    best_for(weight).dgrad_activated(dy, weight, counts, activation, hidden, values, gradient);
  }

 private:
  GroupedGemmEngine& best_for(const torch::Tensor& weight) const {
    return hopper_ && hopper_->supports(weight.scalar_type(), weight.size(1), weight.size(2))
               ? *hopper_
               : *general_;
  }

  std::shared_ptr<GroupedGemmEngine> general_;
  std::shared_ptr<GroupedGemmEngine> hopper_;  // null on other GPUs
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_auto_engine(torch::Device device) {
  return std::make_shared<AutoEngine>(device);
}

}  // namespace anabranch
