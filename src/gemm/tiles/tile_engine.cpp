#include "gemm/tiles/tile_engine.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>

#include "gemm/tiles/sum_dots.h"
#include "kernels/cuda/tensors.h"
#include "support/check.h"
#include "support/cuda/device.h"

namespace anabranch {
namespace {

using tiles::Element;
using tiles::Epilogue;
using tiles::Operation;
using tiles::Problem;
using tiles::Task;

int32_t narrow(int64_t size) {
  constexpr int64_t kEnd = 1 << 30;
  check_input(size < kEnd, "grouped GEMM: this engine takes sizes below 2^30, got ", size);
  return static_cast<int32_t>(size);
}

Problem sizes(int64_t m, int64_t n, int64_t k) {
  Problem problem = {};
  problem.m = narrow(m);
  problem.n = narrow(n);
  problem.k = narrow(k);
  return problem;
}

Element element_of(const torch::Tensor& tensor) {
  return tensor.scalar_type() == torch::kBFloat16 ? Element::kBfloat16 : Element::kHalf;
}

/// A tile's gate and up part must not overlap: whole tiles of kDotColumns.
bool fuses(const HiddenActivation& activation, int64_t n) {
  return activation.is_plain() && (!activation.glu || n % tiles::kDotColumns == 0);
}

}  // namespace

bool TileEngine::supports(torch::Dtype dtype, int64_t n, int64_t k) const {
  return (dtype == torch::kBFloat16 || dtype == torch::kHalf) && n > 0 && k > 0 && n % 8 == 0 &&
         k % 8 == 0;
}

void TileEngine::do_forward(const torch::Tensor& x, const torch::Tensor& weight,
                            const ExpertCounts& counts, torch::Tensor& y) {
  do_forward_gathering(x, weight, counts, y);
}

void TileEngine::do_forward_gathering(const ProductRows& x, const torch::Tensor& weight,
                                      const ExpertCounts& counts, torch::Tensor& y) {
  if (counts.rows() == 0) return;
  multiply({Operation::kForward, element_of(weight)}, {x, weight, y},
           sizes(0, weight.size(1), weight.size(2)), counts);
}

void TileEngine::do_dgrad(const torch::Tensor& dy, const torch::Tensor& weight,
                          const ExpertCounts& counts, torch::Tensor& dx) {
  if (counts.rows() == 0) return;
  multiply({Operation::kDgrad, element_of(weight)}, {dy, weight, dx},
           sizes(0, weight.size(2), weight.size(1)), counts);
}

void TileEngine::do_wgrad(const torch::Tensor& dy, const torch::Tensor& x,
                          const ExpertCounts& counts, torch::Tensor& dweight) {
  do_wgrad_gathering(dy, x, counts, dweight);
}

void TileEngine::do_wgrad_gathering(const ProductRows& dy, const ProductRows& x,
                                    const ExpertCounts& counts, torch::Tensor& dweight) {
  if (counts.rows() == 0) {
    dweight.zero_();
    return;
  }
  multiply({Operation::kWgrad, element_of(dweight)}, {dy, x, dweight},
           sizes(dweight.size(1), dweight.size(2), 0), counts);
}

void TileEngine::do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                                     const ExpertCounts& counts, torch::Tensor& sum) {
  do_wgrad_accumulate_gathering(dy, x, counts, sum);
}

void TileEngine::do_wgrad_accumulate_gathering(const ProductRows& dy, const ProductRows& x,
                                               const ExpertCounts& counts, torch::Tensor& sum) {
  if (counts.rows() == 0) return;
  Problem problem = sizes(sum.size(1), sum.size(2), 0);
  problem.sum = sum.data_ptr<float>();
  multiply({Operation::kWgrad, element_of(dy.rows), Epilogue::kAccumulate}, {dy, x}, problem,
           counts);
}

torch::Tensor TileEngine::do_forward_activated(const torch::Tensor& x, const torch::Tensor& weight,
                                               const ExpertCounts& counts,
                                               const HiddenActivation& activation,
                                               torch::Tensor& hidden) {
  const int64_t n = activation.glu ? weight.size(1) / 2 : weight.size(1);
  if (!fuses(activation, n) || counts.rows() == 0) {
    return GroupedGemmEngine::do_forward_activated(x, weight, counts, activation, hidden);
  }
  return do_forward_activated_gathering(x, weight, counts, activation, hidden);
}

torch::Tensor TileEngine::do_forward_activated_gathering(const ProductRows& x,
                                                         const torch::Tensor& weight,
                                                         const ExpertCounts& counts,
                                                         const HiddenActivation& activation,
                                                         torch::Tensor& hidden) {
  const int64_t n = activation.glu ? weight.size(1) / 2 : weight.size(1);
  if (!fuses(activation, n) || counts.rows() == 0) {
    return GroupedGemmEngine::do_forward_activated_gathering(x, weight, counts, activation, hidden);
  }
  torch::Tensor activated = at::empty({counts.rows(), n}, weight.options());
  Problem problem = sizes(0, n, weight.size(2));
  problem.activation = cuda::kind_of(activation.activation);
  problem.hidden_out = hidden.data_ptr();
  problem.activated = activated.data_ptr();
  multiply({Operation::kForward, element_of(weight), Epilogue::kActivate, activation.glu},
           {x, weight}, problem, counts);
  return activated;
}

void TileEngine::do_dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                                    const ExpertCounts& counts, const HiddenActivation& activation,
                                    const torch::Tensor& hidden,
                                    const torch::Tensor& routing_weights,
                                    ActivatedGradient& gradient) {
  if (!fuses(activation, weight.size(2)) || counts.rows() == 0) {
    return GroupedGemmEngine::do_dgrad_activated(dy, weight, counts, activation, hidden,
                                                 routing_weights, gradient);
  }
  do_dgrad_activated_gathering(dy, weight, counts, activation, hidden, routing_weights, gradient);
}

void TileEngine::do_dgrad_activated_gathering(const ProductRows& dy, const torch::Tensor& weight,
                                              const ExpertCounts& counts,
                                              const HiddenActivation& activation,
                                              const torch::Tensor& hidden,
                                              const torch::Tensor& routing_weights,
                                              ActivatedGradient& gradient) {
  const int64_t n = weight.size(2);
  const int64_t rows = counts.rows();
  if (!fuses(activation, n) || rows == 0) {
    return GroupedGemmEngine::do_dgrad_activated_gathering(dy, weight, counts, activation, hidden,
                                                           routing_weights, gradient);
  }
  const auto dots = at::empty({rows, (n + tiles::kDotColumns - 1) / tiles::kDotColumns},
                              gradient.drouting_weights.options());  // see Problem
  Problem problem = sizes(0, n, weight.size(1));
  problem.activation = cuda::kind_of(activation.activation);
  problem.hidden = hidden.const_data_ptr();
  problem.hidden_out = gradient.dhidden.data_ptr();
  problem.activated = gradient.activated.data_ptr();
  problem.weights = routing_weights.defined() ? routing_weights.const_data_ptr<float>() : nullptr;
  problem.dots = dots.data_ptr<float>();
  multiply({Operation::kDgrad, element_of(weight), Epilogue::kActivateBackward, activation.glu},
           {dy, weight}, problem, counts);
  tiles::launch_sum_dots(dots.const_data_ptr<float>(), dots.size(0), dots.size(1),
                         gradient.drouting_weights.data_ptr<float>(), OnDevice(weight));
}

void TileEngine::multiply(Task task, const Operands& operands, Problem problem,
                          const ExpertCounts& counts) {
  const OnDevice stream(operands.a.rows);
  const auto& on_device = counts.on(operands.a.rows.device());
  problem.experts = narrow(counts.experts());
  problem.first_row = on_device.first_row.const_data_ptr<int64_t>();
  problem.longest_first = on_device.longest_first.const_data_ptr<int64_t>();
  if (operands.a.index.defined()) {
    task.gathered = tiles::Gathered::kA;
  } else if (operands.b.index.defined()) {
    task.gathered = tiles::Gathered::kB;
  }
  launch(task, operands, problem, narrow(counts.rows()), stream);
}

const void* tiles::aligned_data(const torch::Tensor& tensor) {
  const void* const data = tensor.const_data_ptr();
  check_input(reinterpret_cast<uintptr_t>(data) % 16 == 0,
              "grouped GEMM: the data of a tensor of shape ", tensor.sizes(),
              " does not begin at a multiple of 16 bytes");
  return data;
}

int compute_capability(torch::Device device) {
  if (!device.is_cuda() || c10::cuda::device_count() == 0) {
    return 0;
  }
  const auto* properties = device.has_index() ? at::cuda::getDeviceProperties(device.index())
                                              : at::cuda::getCurrentDeviceProperties();
  return 10 * properties->major + properties->minor;
}

}  // namespace anabranch
