#include "plan_check.h"

#include <algorithm>
#include <mutex>
#include <numeric>

#include "support/check.h"

namespace anabranch::operators {
namespace {

/// What a tensor shows, and whether it was written since. Does not keep its memory alive.
struct Glimpse {
  explicit Glimpse(const torch::Tensor& tensor)
      : storage(tensor.storage().getWeakStorageImpl()),
        first(tensor.const_data_ptr()),
        sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        dtype(tensor.scalar_type()),
        version(tensor.is_inference() ? 0 : tensor._version()) {}

  bool shows(const torch::Tensor& tensor) const {
    return !storage.expired() && first == tensor.const_data_ptr() && sizes == tensor.sizes() &&
           strides == tensor.strides() && dtype == tensor.scalar_type() &&
           version == (tensor.is_inference() ? 0 : tensor._version());
  }

  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const void* first;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  torch::Dtype dtype;
  int64_t version;
};

struct KnownPlan {
  std::vector<Glimpse> tensors;
  int64_t top_k;
};

/// Plans that fit, of steps that are under way.
class KnownPlans {
 public:
  bool contain(at::TensorList list, int64_t top_k) {
    const std::scoped_lock lock(mutex_);
    return std::any_of(plans_.begin(), plans_.end(), [&](const KnownPlan& known) {
      return (top_k == 0 || top_k == known.top_k) &&
             std::equal(
                 known.tensors.begin(), known.tensors.end(), list.begin(), list.end(),
                 [](const auto& glimpse, const auto& tensor) { return glimpse.shows(tensor); });
    });
  }

  void add(at::TensorList list, int64_t top_k) {
    const std::scoped_lock lock(mutex_);
    std::erase_if(plans_, [](const KnownPlan& known) {
      return std::any_of(known.tensors.begin(), known.tensors.end(),
                         [](const auto& glimpse) { return glimpse.storage.expired(); });
    });
    KnownPlan plan{{}, top_k};
    for (const auto& tensor : list) plan.tensors.emplace_back(tensor);
    plans_.push_back(std::move(plan));
  }

 private:
  std::mutex mutex_;
  std::vector<KnownPlan> plans_;
};

KnownPlans& known_plans() {
  static auto* const only =
      new KnownPlans;  // never destroyed: tensors of the program may outlive it
  return *only;
}

int64_t sum(const std::vector<int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

void check_counts(const std::vector<int64_t>& counts, const char* name) {
  const bool negative = std::any_of(counts.begin(), counts.end(), [](int64_t n) { return n < 0; });
  check_input(!negative, "plan: ", name, " are [", c10::Join(", ", counts),
              "], expected 0 or more");
}

/// int64 [size] on `device`.
void check_size(const torch::Tensor& tensor, int64_t size, torch::Device device, const char* name) {
  check_input(tensor.scalar_type() == torch::kInt64 && tensor.dim() == 1 &&
                  tensor.size(0) == size && tensor.device() == device,
              "plan: ", name, " is ", tensor.scalar_type(), " ", tensor.sizes(), " on ",
              tensor.device(), ", expected int64 [", size, "] on ", device, " for its counts");
}

/// Every index in [0, end).
void check_range(const torch::Tensor& tensor, int64_t end, const char* name) {
  const auto values = tensor.cpu().contiguous();
  const auto* first = values.const_data_ptr<int64_t>();
  const auto* last = first + values.numel();
  const auto* wrong = std::find_if(first, last, [&](int64_t i) { return i < 0 || i >= end; });
  check_input(wrong == last, "plan: ", name, " holds ", wrong == last ? 0 : *wrong,
              ", expected indices from 0 to ", end - 1);
}

/// From 0, ascending, to `end`.
void check_offsets(const torch::Tensor& tensor, int64_t end, const char* name) {
  const auto values = tensor.cpu().contiguous();
  const auto* first = values.const_data_ptr<int64_t>();
  const auto* last = first + values.numel();
  check_input(*first == 0 && *(last - 1) == end && std::is_sorted(first, last), "plan: ", name,
              " do not ascend from 0 to ", end);
}

void check_sizes(const ExchangePlan& plan) {
  check_counts(plan.send_rows, "send_rows");
  check_counts(plan.receive_rows, "receive_rows");
  check_counts(plan.send_assignments, "send_assignments");
  check_counts(plan.receive_assignments, "receive_assignments");
  check_counts(plan.expert_counts.on_host(), "expert_counts");
  const int64_t arrived = sum(plan.receive_assignments);
  check_input(plan.expert_counts.rows() == arrived, "plan: expert_counts sum to ",
              plan.expert_counts.rows(), ", expected the ", arrived, " of receive_assignments");
  const auto device = plan.send_tokens.device();
  const int64_t sent = sum(plan.send_rows);
  check_size(plan.send_tokens, sent, device, "send_tokens");
  check_size(plan.token_rows, sent, device, "token_rows");
  check_size(plan.token_offsets, plan.tokens + 1, device, "token_offsets");
  check_size(plan.send_order, sum(plan.send_assignments), device, "send_order");
  check_size(plan.received_order, arrived, device, "received_order");
  check_size(plan.assignment_rows, arrived, device, "assignment_rows");
  check_size(plan.row_offsets, sum(plan.receive_rows) + 1, device, "row_offsets");
  check_size(plan.row_assignments, arrived, device, "row_assignments");
}

void check_indices(const ExchangePlan& plan) {
  check_range(plan.send_tokens, plan.tokens, "send_tokens");
  check_offsets(plan.token_offsets, plan.token_rows.size(0), "token_offsets");
  check_range(plan.token_rows, plan.send_tokens.size(0), "token_rows");
  if (plan.top_k > 0) {
    check_range(plan.send_order, plan.tokens * plan.top_k, "send_order");
  }
  check_range(plan.received_order, plan.assignments(), "received_order");
  check_range(plan.assignment_rows, plan.rows(), "assignment_rows");
  check_offsets(plan.row_offsets, plan.assignments(), "row_offsets");
  check_range(plan.row_assignments, plan.assignments(), "row_assignments");
}

}  // namespace

void check_plan(const ExchangePlan& plan, at::TensorList list) {
  if (known_plans().contain(list, plan.top_k)) {
    return;
  }
  check_sizes(plan);
  check_indices(plan);
  known_plans().add(list, plan.top_k);
}

void remember_plan(at::TensorList list, int64_t top_k) { known_plans().add(list, top_k); }

}  // namespace anabranch::operators
