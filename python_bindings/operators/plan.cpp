#include "plan.h"

#include <algorithm>
#include <concepts>
#include <tuple>

#include "plan_check.h"
#include "support/check.h"

namespace anabranch::operators {
namespace {

template <typename T>
struct PlanField {
  const char* name;
  T ExchangePlan::*member;
};

constexpr std::tuple kPlanFields = {
    PlanField{"send_rows", &ExchangePlan::send_rows},
    PlanField{"receive_rows", &ExchangePlan::receive_rows},
    PlanField{"send_assignments", &ExchangePlan::send_assignments},
    PlanField{"receive_assignments", &ExchangePlan::receive_assignments},
    PlanField{"expert_counts", &ExchangePlan::expert_counts},
    PlanField{"send_tokens", &ExchangePlan::send_tokens},
    PlanField{"token_offsets", &ExchangePlan::token_offsets},
    PlanField{"token_rows", &ExchangePlan::token_rows},
    PlanField{"send_order", &ExchangePlan::send_order},
    PlanField{"received_order", &ExchangePlan::received_order},
    PlanField{"assignment_rows", &ExchangePlan::assignment_rows},
    PlanField{"row_offsets", &ExchangePlan::row_offsets},
    PlanField{"row_assignments", &ExchangePlan::row_assignments},
};

/// Calls `visit(name, member)` for each of them.
template <typename Plan, typename Visit>
void for_each_member(Plan&& plan, const Visit& visit) {
  std::apply([&](const auto&... field) { (visit(field.name, plan.*field.member), ...); },
             kPlanFields);
}

}  // namespace

std::vector<std::string> plan_fields() {
  std::vector<std::string> names;
  for_each_member(ExchangePlan(), [&](const char* name, const auto&) { names.emplace_back(name); });
  return names;
}

std::vector<torch::Tensor> pack_plan(const ExchangePlan& plan) {
  std::vector<torch::Tensor> list;
  for_each_member(plan, [&](const char*, const auto& member) {
    if constexpr (std::same_as<std::remove_cvref_t<decltype(member)>, torch::Tensor>) {
      const bool shared = std::any_of(list.begin(), list.end(), [&](const auto& earlier) {
        return earlier.is_alias_of(member);
      });
      list.push_back(shared ? member.clone() : member);
    } else if constexpr (std::same_as<std::remove_cvref_t<decltype(member)>, ExpertCounts>) {
      list.push_back(at::tensor(member.on_host(), at::TensorOptions(at::kLong)));
    } else {
      list.push_back(at::tensor(member, at::TensorOptions(at::kLong)));
    }
  });
  remember_plan(list, plan.top_k);
  return list;
}

ExchangePlan unpack_plan(at::TensorList list, int64_t top_k) {
  constexpr size_t kFields = std::tuple_size_v<decltype(kPlanFields)>;
  check_input(list.size() == kFields, "a plan has ", kFields, " tensors, not ", list.size());
  ExchangePlan plan;
  size_t place = 0;
  for_each_member(plan, [&](const char*, auto& member) {
    if constexpr (std::same_as<std::remove_cvref_t<decltype(member)>, torch::Tensor>) {
      member = list[place++].contiguous();
    } else {
      member = counts_from(list[place++]);
    }
  });
  check_input(plan.token_offsets.numel() > 0 && plan.row_offsets.numel() > 0,
              "plan: token_offsets and row_offsets begin with a 0, and are empty");
  plan.tokens = plan.token_offsets.size(0) - 1;
  plan.top_k = top_k;
  check_plan(plan, list);
  return plan;
}

std::vector<int64_t> counts_from(const torch::Tensor& tensor) {
  check_input(tensor.is_cpu() && tensor.scalar_type() == at::kLong && tensor.dim() == 1,
              "counts must be int64 [n] in host memory, not ", tensor.scalar_type(), " ",
              tensor.sizes(), " on ", tensor.device());
  const auto contiguous = tensor.contiguous();
  const auto* data = contiguous.const_data_ptr<int64_t>();
  return {data, data + contiguous.numel()};
}

}  // namespace anabranch::operators
