#include <anabranch/error.h>
#include <anabranch/grouped_gemm.h>

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>

#include "gemm/auto/auto_engine.h"
#include "gemm/engines.h"
#include "kernels/activation.h"
#include "kernels/rows.h"
#include "support/check.h"

namespace anabranch {
namespace {

/// What a tensor is to be of.
struct Kind {
  torch::Dtype dtype;
  torch::Device device;
};

/// `tensor` may be undefined: it is then refused where it is checked.
Kind kind_of(const torch::Tensor& tensor) {
  return tensor.defined() ? Kind{tensor.scalar_type(), tensor.device()}
                          : Kind{torch::kFloat32, torch::kCPU};
}

/// Of what is summed over rows of `rows`' type.
Kind kind_of_sums(const torch::Tensor& rows) {
  const auto [dtype, device] = kind_of(rows);
  return {at::toOpMathType(dtype), device};
}

void check_operand(const torch::Tensor& tensor, int64_t dim, const char* name, const Kind& kind) {
  check_input(tensor.defined(), "grouped GEMM: ", name, " is undefined");
  check_input(tensor.dim() == dim && tensor.is_contiguous(), "grouped GEMM: ", name, " is ",
              tensor.sizes(), tensor.is_contiguous() ? "" : " and not contiguous",
              ", expected a contiguous tensor of ", dim, " dimensions");
  check_input(at::isFloatingType(tensor.scalar_type()) && tensor.scalar_type() == kind.dtype &&
                  tensor.device() == kind.device,
              "grouped GEMM: ", name, " is ", tensor.scalar_type(), " on ", tensor.device(),
              ", expected one floating type and device as ", kind.dtype, " on ", kind.device);
}

void check_output(const torch::Tensor& tensor, at::IntArrayRef sizes, const char* name,
                  const Kind& kind) {
  check_operand(tensor, static_cast<int64_t>(sizes.size()), name, kind);
  check_input(tensor.sizes() == sizes, "grouped GEMM: ", name, " is ", tensor.sizes(),
              ", expected ", sizes);
}

void check_counts(const ExpertCounts& expert_counts, int64_t rows) {
  if (!expert_counts.known_to_host()) {  // who made them answers for them
    check_input(expert_counts.rows() == rows, "grouped GEMM: counts of ", expert_counts.rows(),
                " rows with ", rows, " rows");
    return;
  }
  const auto& counts = expert_counts.on_host();
  int64_t total = 0;
  for (const int64_t count : counts) {
    if (count < 0 || count > rows - total) {  // the message would cost more than the check
      throw InputError(c10::str("grouped GEMM: counts [", c10::Join(", ", counts),
                                "] must be non-negative and sum to the ", rows, " rows"));
    }
    total += count;
  }
  if (expert_counts.rows() != rows) {
    throw InputError(c10::str("grouped GEMM: counts [", c10::Join(", ", counts), "] sum to ", total,
                              ", not to the ", rows, " rows"));
  }
}

void check_supported(const GroupedGemmEngine& engine, torch::Dtype dtype, int64_t n, int64_t k) {
  check_input(engine.supports(dtype, n, k), "grouped GEMM: the engine ", engine.name(),
              " does not take ", dtype, " weights of ", n, " x ", k);
}

int64_t count(const ProductRows& rows) {
  return (rows.index.defined() ? rows.index : rows.rows).size(0);
}

/// As they are multiplied.
torch::Tensor copied(const ProductRows& rows) {
  return rows.index.defined()
             ? RowKernels::on(rows.rows.device()).gather_rows(rows.rows, rows.index)
             : rows.rows;
}

void check_rows(const ProductRows& rows, const char* name, const Kind& kind) {
  check_operand(rows.rows, 2, name, kind);
  const auto& index = rows.index;
  check_input(
      !index.defined() || (index.dim() == 1 && index.is_contiguous() &&
                           index.scalar_type() == torch::kInt64 && index.device() == kind.device),
      "grouped GEMM: the index of ", name, " is ", index.defined() ? index.toString() : "",
      ", expected contiguous int64 [rows] on ", kind.device);
}

/// Rows whose width is the weight's size `dim`: 2 in forward, 1 in dgrad.
void check_product(const GroupedGemmEngine& engine, const ProductRows& rows, const char* name,
                   const torch::Tensor& weight, int64_t dim, const ExpertCounts& counts) {
  const Kind kind = kind_of(rows.rows);
  check_rows(rows, name, kind);
  check_operand(weight, 3, "weight", kind);
  check_input(weight.size(0) == counts.experts(), "grouped GEMM: weight of ", weight.size(0),
              " experts with ", counts.experts(), " counts");
  check_input(weight.size(dim) == rows.rows.size(1), "grouped GEMM: rows of width ",
              rows.rows.size(1), " against a weight of shape ", weight.sizes());
  check_counts(counts, count(rows));
  check_supported(engine, weight.scalar_type(), weight.size(1), weight.size(2));
}

std::array<int64_t, 3> sizes_of_wgrad(const ProductRows& dy, const ProductRows& x,
                                      const ExpertCounts& counts) {
  return {counts.experts(), dy.rows.size(1), x.rows.size(1)};
}

/// `result`: of the weight's sizes, and of `result_kind`.
void check_wgrad(const GroupedGemmEngine& engine, const ProductRows& dy, const ProductRows& x,
                 const ExpertCounts& counts, const torch::Tensor& result, const char* name,
                 const Kind& result_kind) {
  const Kind kind = kind_of(dy.rows);
  check_rows(dy, "dy", kind);
  check_rows(x, "x", kind);
  check_input(!dy.index.defined() || !x.index.defined(),
              "grouped GEMM: dy and x have an index, expected one of them at most");
  check_input(count(x) == count(dy), "grouped GEMM: dy has ", count(dy), " rows and x ", count(x));
  check_counts(counts, count(x));
  check_output(result, sizes_of_wgrad(dy, x, counts), name, result_kind);
  check_supported(engine, dy.rows.scalar_type(), dy.rows.size(1), x.rows.size(1));
}

}  // namespace

bool GroupedGemmEngine::supports(torch::Dtype /*dtype*/, int64_t /*n*/, int64_t /*k*/) const {
  return true;
}

std::string GroupedGemmEngine::explain() const { return name(); }

bool GroupedGemmEngine::is_settled() const { return true; }

std::string GroupedGemmEngine::choices() const { return {}; }

void GroupedGemmEngine::settle_on(const std::string& /*choices*/) {}

bool GroupedGemmEngine::gathers(GatheredRows /*rows*/, torch::Dtype /*dtype*/, int64_t /*n*/,
                                int64_t /*k*/) const {
  return false;
}

int64_t GroupedGemmEngine::padding_rows(const ExpertCounts& /*counts*/) const { return 0; }

void GroupedGemmEngine::forward(const ProductRows& x, const torch::Tensor& weight,
                                const ExpertCounts& counts, torch::Tensor& y) {
  check_product(*this, x, "x", weight, 2, counts);
  check_output(y, {count(x), weight.size(1)}, "y", kind_of(x.rows));
  x.index.defined() ? do_forward_gathering(x, weight, counts, y)
                    : do_forward(x.rows, weight, counts, y);
}

void GroupedGemmEngine::dgrad(const torch::Tensor& dy, const torch::Tensor& weight,
                              const ExpertCounts& counts, torch::Tensor& dx) {
  check_product(*this, dy, "dy", weight, 1, counts);
  check_output(dx, {dy.size(0), weight.size(2)}, "dx", kind_of(dy));
  do_dgrad(dy, weight, counts, dx);
}

void GroupedGemmEngine::wgrad(const ProductRows& dy, const ProductRows& x,
                              const ExpertCounts& counts, torch::Tensor& dweight) {
  check_wgrad(*this, dy, x, counts, dweight, "dweight", kind_of(dy.rows));
  dy.index.defined() || x.index.defined() ? do_wgrad_gathering(dy, x, counts, dweight)
                                          : do_wgrad(dy.rows, x.rows, counts, dweight);
}

void GroupedGemmEngine::wgrad_accumulate(const ProductRows& dy, const ProductRows& x,
                                         const ExpertCounts& counts, torch::Tensor& sum) {
  check_wgrad(*this, dy, x, counts, sum, "sum", kind_of_sums(dy.rows));
  dy.index.defined() || x.index.defined() ? do_wgrad_accumulate_gathering(dy, x, counts, sum)
                                          : do_wgrad_accumulate(dy.rows, x.rows, counts, sum);
  sum.unsafeGetTensorImpl()->bump_version();  // as of whatever is written in place
}

torch::Tensor GroupedGemmEngine::forward_activated(const ProductRows& x,
                                                   const torch::Tensor& weight,
                                                   const ExpertCounts& counts,
                                                   const HiddenActivation& activation,
                                                   torch::Tensor& hidden) {
  check_product(*this, x, "x", weight, 2, counts);
  check_output(hidden, {count(x), weight.size(1)}, "hidden", kind_of(x.rows));
  check_input(!activation.glu || weight.size(1) % 2 == 0, "grouped GEMM: a weight of shape ",
              weight.sizes(), " has no gate and up half");
  return x.index.defined() ? do_forward_activated_gathering(x, weight, counts, activation, hidden)
                           : do_forward_activated(x.rows, weight, counts, activation, hidden);
}

void GroupedGemmEngine::dgrad_activated(const ProductRows& dy, const torch::Tensor& weight,
                                        const ExpertCounts& counts,
                                        const HiddenActivation& activation,
                                        const torch::Tensor& hidden,
                                        const torch::Tensor& routing_weights,
                                        ActivatedGradient& gradient) {
  check_product(*this, dy, "dy", weight, 1, counts);
  const Kind kind = kind_of(dy.rows);
  const int64_t rows = count(dy);
  const int64_t n = weight.size(2);
  const int64_t hidden_width = activation.glu ? 2 * n : n;
  check_output(hidden, {rows, hidden_width}, "hidden", kind);
  check_output(gradient.dhidden, {rows, hidden_width}, "dhidden", kind);
  check_output(gradient.activated, {rows, n}, "activated", kind);
  check_output(gradient.drouting_weights, {rows}, "drouting_weights", kind_of_sums(dy.rows));
  if (routing_weights.defined()) {
    check_output(routing_weights, {rows}, "routing_weights", kind_of_sums(dy.rows));
  }
  if (dy.index.defined()) {
    do_dgrad_activated_gathering(dy, weight, counts, activation, hidden, routing_weights, gradient);
  } else {
    do_dgrad_activated(dy.rows, weight, counts, activation, hidden, routing_weights, gradient);
  }
}

void GroupedGemmEngine::do_forward_gathering(const ProductRows& x, const torch::Tensor& weight,
                                             const ExpertCounts& counts, torch::Tensor& y) {
  do_forward(copied(x), weight, counts, y);
}

void GroupedGemmEngine::do_wgrad_gathering(const ProductRows& dy, const ProductRows& x,
                                           const ExpertCounts& counts, torch::Tensor& dweight) {
  do_wgrad(copied(dy), copied(x), counts, dweight);
}

void GroupedGemmEngine::do_wgrad_accumulate_gathering(const ProductRows& dy, const ProductRows& x,
                                                      const ExpertCounts& counts,
                                                      torch::Tensor& sum) {
  do_wgrad_accumulate(copied(dy), copied(x), counts, sum);
}

torch::Tensor GroupedGemmEngine::do_forward_activated_gathering(const ProductRows& x,
                                                                const torch::Tensor& weight,
                                                                const ExpertCounts& counts,
                                                                const HiddenActivation& activation,
                                                                torch::Tensor& hidden) {
  return do_forward_activated(copied(x), weight, counts, activation, hidden);
}

void GroupedGemmEngine::do_dgrad_activated_gathering(
    const ProductRows& dy, const torch::Tensor& weight, const ExpertCounts& counts,
    const HiddenActivation& activation, const torch::Tensor& hidden,
    const torch::Tensor& routing_weights, ActivatedGradient& gradient) {
  do_dgrad_activated(copied(dy), weight, counts, activation, hidden, routing_weights, gradient);
}

void GroupedGemmEngine::do_wgrad_accumulate(const torch::Tensor& dy, const torch::Tensor& x,
                                            const ExpertCounts& counts, torch::Tensor& sum) {
  int64_t first_row = 0;
  for (int64_t e = 0; e < counts.experts(); ++e) {
    const int64_t count = counts.on_host()[e];
    const auto rows_of = [&](const torch::Tensor& tensor) {
      return tensor.narrow(0, first_row, count).to(sum.scalar_type());
    };
    sum[e].addmm_(rows_of(dy).t(), rows_of(x));
    first_row += count;
  }
}

torch::Tensor GroupedGemmEngine::do_forward_activated(const torch::Tensor& x,
                                                      const torch::Tensor& weight,
                                                      const ExpertCounts& counts,
                                                      const HiddenActivation& activation,
                                                      torch::Tensor& hidden) {
  do_forward(x, weight, counts, hidden);
  return ActivationKernels::on(x.device()).activate(hidden, activation);
}

void GroupedGemmEngine::do_dgrad_activated(const torch::Tensor& dy, const torch::Tensor& weight,
                                           const ExpertCounts& counts,
                                           const HiddenActivation& activation,
                                           const torch::Tensor& hidden,
                                           const torch::Tensor& routing_weights,
                                           ActivatedGradient& gradient) {
  do_dgrad(dy, weight, counts, gradient.activated);
  ActivationKernels::on(dy.device())
      .activate_backward(gradient.activated, hidden, routing_weights, activation,
                         {gradient.dhidden, gradient.drouting_weights});
}

torch::Tensor grouped_gemm(GroupedGemmEngine& engine, const torch::Tensor& x,
                           const torch::Tensor& weight, const ExpertCounts& counts) {
  check_operand(x, 2, "x", kind_of(x));
  check_operand(weight, 3, "weight", kind_of(x));
  torch::Tensor y = at::empty({x.size(0), weight.size(1)}, x.options());
  engine.forward(x, weight, counts, y);
  return y;
}

torch::Tensor grouped_gemm_dgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& weight, const ExpertCounts& counts) {
  check_operand(dy, 2, "dy", kind_of(dy));
  check_operand(weight, 3, "weight", kind_of(dy));
  torch::Tensor dx = at::empty({dy.size(0), weight.size(2)}, dy.options());
  engine.dgrad(dy, weight, counts, dx);
  return dx;
}

torch::Tensor grouped_gemm_wgrad(GroupedGemmEngine& engine, const torch::Tensor& dy,
                                 const torch::Tensor& x, const ExpertCounts& counts) {
  check_operand(dy, 2, "dy", kind_of(dy));
  check_operand(x, 2, "x", kind_of(dy));
  torch::Tensor dweight = at::empty(sizes_of_wgrad(dy, x, counts), dy.options());
  engine.wgrad(dy, x, counts, dweight);
  return dweight;
}

std::vector<std::string> grouped_gemm_engines(torch::Device device) {
  check_input(device.is_cpu() || device.is_cuda(), "there is no grouped GEMM for ", device);
  std::vector<std::string> names;
  for (const EngineEntry& entry : engines_on(device)) {
    names.push_back(entry.name);
  }
  return names;
}

std::shared_ptr<GroupedGemmEngine> make_grouped_gemm_engine(torch::Device device,
                                                            const std::string& name) {
  const auto names = grouped_gemm_engines(device);
  if (names.empty()) {
    throw NotBuiltError(
        "grouped GEMM on a GPU needs a build of anabranch with CUDA (ANABRANCH_CUDA=ON)");
  }
  if (name == "auto" || name == "deterministic") {
    auto engine = make_auto_engine(device);
    if (name == "deterministic") {
      engine->settle_on({});
    }
    return engine;
  }
  const auto known = std::find(names.begin(), names.end(), name);
  check_input(known != names.end(), "grouped GEMM engine \"", name, "\" is unknown on ", device,
              ": choose auto, deterministic or ", c10::Join(", ", names));
  return engines_on(device)[known - names.begin()].make(device);
}

}  // namespace anabranch
