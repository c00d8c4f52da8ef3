#include "finished_gradients.h"

#include <ATen/ATen.h>
#include <anabranch/gradients.h>

#include <mutex>
#include <unordered_map>

#include "support/check.h"

namespace anabranch {
namespace {

struct Mark {
  /// Keeps the address from being used again.
  c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> gradient;
  int64_t version;
};

struct Marks {
  std::mutex mutex;
  std::unordered_map<const at::TensorImpl*, Mark> of;
};

Marks& marks() {
  static auto* const all = new Marks;  // gradients may outlive static destruction
  return *all;
}

void mark(Marks& all, const torch::Tensor& gradient) {
  all.of.insert_or_assign(
      gradient.unsafeGetTensorImpl(),
      Mark{decltype(Mark::gradient)(gradient.getIntrusivePtr()), gradient._version()});
}

void check_unfinished(const torch::Tensor& gradient, const Mark& mark) {
  const auto changes = gradient._version() - mark.version;
  check_input(
      changes > 0, "finish_gradients: an expert's gradient ", gradient.sizes(),
      " is finished already and would be divided twice: call it once a step, after the last "
      "backward");
  // Set to zero and nothing more is harmless.
  check_input(changes > 1 || !gradient.any().item<bool>(),
              "finish_gradients: a backward has added to an expert's gradient ", gradient.sizes(),
              " that was finished before, which would be divided twice: call it once a step, after "
              "the last micro-batch's backward, and zero_grad after the step");
}

}  // namespace

void check_unfinished(const std::vector<torch::Tensor>& gradients) {
  auto& all = marks();
  const std::scoped_lock lock(all.mutex);
  for (const auto& gradient : gradients) {
    const auto found = all.of.find(gradient.unsafeGetTensorImpl());
    if (found != all.of.end()) check_unfinished(gradient, found->second);
  }
}

void mark_finished(const std::vector<torch::Tensor>& gradients) {
  auto& all = marks();
  const std::scoped_lock lock(all.mutex);
  std::erase_if(all.of, [](const auto& entry) { return entry.second.gradient.expired(); });
  for (const auto& gradient : gradients) mark(all, gradient);
}

void mark_unfinished(const std::vector<torch::Tensor>& gradients) {
  auto& all = marks();
  const std::scoped_lock lock(all.mutex);
  for (const auto& gradient : gradients) all.of.erase(gradient.unsafeGetTensorImpl());
}

void mark_again(const std::vector<torch::Tensor>& gradients) {
  auto& all = marks();
  const std::scoped_lock lock(all.mutex);
  for (const auto& gradient : gradients) {
    if (all.of.contains(gradient.unsafeGetTensorImpl())) mark(all, gradient);
  }
}

bool is_finished(const torch::Tensor& gradient) {
  auto& all = marks();
  const std::scoped_lock lock(all.mutex);
  return all.of.contains(gradient.unsafeGetTensorImpl());
}

}  // namespace anabranch
