#include "metrics/timeline.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <iomanip>
#include <sstream>

namespace train_lm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The identity, marking its gradient.
struct MarkedBackward : torch::autograd::Function<MarkedBackward> {
  static torch::Tensor forward(AutogradContext* context, const torch::Tensor& x, int64_t timeline,
                               int64_t name) {
    context->saved_data["timeline"] = timeline;
    context->saved_data["name"] = name;
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto* timeline = reinterpret_cast<Timeline*>(context->saved_data["timeline"].toInt());
    timeline->mark(reinterpret_cast<const char*>(context->saved_data["name"].toInt()));
    return {gradients[0], {}, {}};
  }
};

}  // namespace

void Timeline::start(torch::Device device) { device_ = device; }

void Timeline::mark(const char* name) {
  if (!device_) {
    return;
  }
  Mark mark{name, Moment(*device_)};
  const std::lock_guard lock(mutex_);
  marks_.push_back(std::move(mark));
}

torch::Tensor Timeline::mark(const torch::Tensor& x, const char* name, const char* backward_name) {
  mark(name);
  if (!device_ || !x.requires_grad()) {
    return x;
  }
  return MarkedBackward::apply(x, reinterpret_cast<int64_t>(this),
                               reinterpret_cast<int64_t>(backward_name));
}

void Timeline::stop() {
  const std::lock_guard lock(mutex_);
  for (size_t i = 1; i < marks_.size(); ++i) {
    const auto& mark = marks_[i];
    milliseconds_[mark.name] += 1e3 * marks_[i - 1].moment.seconds_until(mark.moment);
  }
  marks_.clear();
  device_.reset();
}

double Timeline::milliseconds() const {
  double sum = 0;
  for (const auto& [name, milliseconds] : milliseconds_) {
    sum += milliseconds;
  }
  return sum;
}

std::string Timeline::table(double steps) const {
  std::vector<std::pair<double, std::string>> rows;
  const double sum = milliseconds() / steps;
  for (const auto& [name, milliseconds] : milliseconds_) {
    rows.emplace_back(milliseconds / steps, name);
  }
  std::sort(rows.rbegin(), rows.rend());
  std::ostringstream table;
  table << "ms of a step (mean of " << steps << "):\n" << std::fixed;
  for (const auto& [milliseconds, name] : rows) {
    table << std::setprecision(2) << std::setw(10) << milliseconds << std::setprecision(1)
          << std::setw(7) << 100 * milliseconds / sum << " %  " << name << '\n';
  }
  table << std::setprecision(2) << std::setw(10) << sum << "  100.0 %  all";
  return table.str();
}

}  // namespace train_lm
