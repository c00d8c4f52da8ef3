#include "gemm/hopper/hopper_engine.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "gemm/hopper/launch.h"
#include "gemm/hopper/tensor_map.h"
#include "gemm/hopper/tile_choice.h"
#include "kernels/cuda/tensors.h"
#include "support/check.h"
#include "support/cuda/device.h"

namespace anabranch {
namespace {

using hopper::Element;
using hopper::Epilogue;
using hopper::Maps;
using hopper::Operation;
using hopper::Problem;
using hopper::rows_map;
using hopper::Task;
using hopper::weight_map;

int32_t narrow(int64_t size) {
  check_input(size < hopper::kRowsEnd,
              "grouped GEMM: the hopper engine takes sizes below 2^30, got ", size);
  return static_cast<int32_t>(size);
}

class HopperEngine final : public GroupedGemmEngine {
 public:
  std::string name() const override { return "hopper"; }

  bool supports(torch::Dtype dtype, int64_t n, int64_t k) const override {
    return (dtype == torch::kBFloat16 || dtype == torch::kHalf) && n > 0 && k > 0 && n % 8 == 0 &&
           k % 8 == 0;
  }

 private:
  void do_forward(const torch::Tensor& x, const torch::Tensor& weight, const ExpertCounts& counts,
                  torch::Tensor& y) override {
    if (x.size(0) == 0) return;
    multiply({Operation::kForward, element_of(x)}, {rows_map(x), weight_map(weight), rows_map(y)},
             sizes(0, weight.size(1), weight.size(2)), counts, x);
  }

  void do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight, const ExpertCounts& counts,
                torch::Tensor& dx) override {
    if (dy.size(0) == 0) return;
    multiply({Operation::kDgrad, element_of(dy)}, {rows_map(dy), weight_map(weight), rows_map(dx)},
             sizes(0, weight.size(2), weight.size(1)), counts, dy);
  }

  void do_wgrad(const torch::Tensor& dy, const torch::Tensor& x, const ExpertCounts& counts,
                torch::Tensor& dweight) override {
    if (dy.size(0) == 0) {
      dweight.zero_();
      return;
    }
    multiply({Operation::kWgrad, element_of(dy)}, {rows_map(dy), rows_map(x), weight_map(dweight)},
             sizes(dweight.size(1), dweight.size(2), 0), counts, dy);
  }

  void do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                           const ExpertCounts& counts, torch::Tensor& sum) override {
    if (dy.size(0) == 0) return;
    Problem problem = sizes(sum.size(1), sum.size(2), 0);
    problem.sum = sum.data_ptr<float>();
    multiply({Operation::kWgrad, element_of(dy), Epilogue::kAccumulate},
             {rows_map(dy), rows_map(x)}, problem, counts, dy);
  }

  torch::Tensor do_forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                     const ExpertCounts& counts, const HiddenActivation& activation,
                                     torch::Tensor& hidden) override {
    const int64_t n = activation.glu ? weight.size(1) / 2 : weight.size(1);
    if (!fuses(activation, n) || x.size(0) == 0) {
      return GroupedGemmEngine::do_forward_activated(x, weight, counts, activation, hidden);
    }
    torch::Tensor activated = at::empty({x.size(0), n}, x.options());
    Problem problem = sizes(0, n, weight.size(2));
    problem.activation = cuda::kind_of(activation.activation);
    problem.hidden_out = hidden.data_ptr();
    problem.activated = activated.data_ptr();
    multiply({Operation::kForward, element_of(x), Epilogue::kActivate, activation.glu},
             {rows_map(x), weight_map(weight)}, problem, counts, x);
    return activated;
  }

  void do_dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                          const ExpertCounts& counts, const HiddenActivation& activation,
                          const torch::Tensor& hidden, const torch::Tensor& routing_weights,
                          ActivatedGradient& gradient) override {
    const int64_t n = weight.size(2);
    if (!fuses(activation, n) || dy.size(0) == 0) {
      return GroupedGemmEngine::do_dgrad_activated(dy, weight, counts, activation, hidden,
                                                   routing_weights, gradient);
    }
    const auto dots =
        at::empty({dy.size(0), (n + 63) / 64}, gradient.drouting_weights.options());  // see Problem
    Problem problem = sizes(0, n, weight.size(1));
    problem.activation = cuda::kind_of(activation.activation);
    problem.hidden = hidden.const_data_ptr();
    problem.hidden_out = gradient.dhidden.data_ptr();
    problem.activated = gradient.activated.data_ptr();
    problem.weights = routing_weights.defined() ? routing_weights.const_data_ptr<float>() : nullptr;
    problem.dots = dots.data_ptr<float>();
    multiply({Operation::kDgrad, element_of(dy), Epilogue::kActivateBackward, activation.glu},
             {rows_map(dy), weight_map(weight)}, problem, counts, dy);
    hopper::launch_sum_dots(dots.const_data_ptr<float>(), dots.size(0), dots.size(1),
                            gradient.drouting_weights.data_ptr<float>(), OnDevice(dy));
  }

  /// A tile's gate and up part must not overlap: whole boxes.
  static bool fuses(const HiddenActivation& activation, int64_t n) {
    return activation.is_plain() && (!activation.glu || n % 64 == 0);
  }

  static Element element_of(const torch::Tensor& tensor) {
    return tensor.scalar_type() == torch::kBFloat16 ? Element::kBfloat16 : Element::kHalf;
  }

  static Problem sizes(int64_t m, int64_t n, int64_t k) {
    Problem problem = {};
    problem.m = narrow(m);
    problem.n = narrow(n);
    problem.k = narrow(k);
    return problem;
  }

  static void multiply(const Task& task, const Maps& maps, Problem problem,
                       const ExpertCounts& counts, const torch::Tensor& like) {
    const OnDevice stream(like);
    const auto& on_device = counts.on(like.device());
    problem.band = hopper::choose_band(task.operation, problem.n, problem.k);
    problem.experts = narrow(counts.experts());
    problem.first_row = on_device.first_row.const_data_ptr<int64_t>();
    problem.longest_first = on_device.longest_first.const_data_ptr<int64_t>();
    hopper::launch_grouped_gemm(task, maps, problem, narrow(counts.rows()), stream);
  }
};

}  // namespace

std::shared_ptr<GroupedGemmEngine> make_hopper_engine() { return std::make_shared<HopperEngine>(); }

bool runs_hopper(torch::Device device) {
  if (!device.is_cuda() || c10::cuda::device_count() == 0) {
    return false;
  }
  const auto* properties = device.has_index() ? at::cuda::getDeviceProperties(device.index())
                                              : at::cuda::getCurrentDeviceProperties();
  return properties->major == 9 && properties->minor == 0;
}

}  // namespace anabranch
