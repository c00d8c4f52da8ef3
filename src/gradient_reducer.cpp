#include <ATen/ATen.h>
#include <anabranch/gradient_reducer.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "exchange/late_refusals.h"
#include "finished_gradients.h"
#include "gradient_lane.h"
#include "gradient_means.h"
#include "support/check.h"

namespace anabranch {
namespace {

using torch::autograd::variable_list;

/// What owns the node that adds to a parameter's gradient: another pointer in torch 2.15 than before.
using Accumulator = decltype(torch::autograd::impl::grad_accumulator(torch::Tensor()));

/// Calls when a backward has added to a parameter's gradient, or had nothing to add.
class AfterAccumulation : public torch::autograd::FunctionPostHook {
 public:
  explicit AfterAccumulation(std::function<void()> call) : call_(std::move(call)) {}
  variable_list operator()(const variable_list& outputs, const variable_list& /*inputs*/) override {
    call_();
    return outputs;
  }

 private:
  std::function<void()> call_;
};

/// A lane and which parameters' gradients each of its messages holds.
struct Way {
  Way(std::shared_ptr<Communicator> communicator, int64_t divisor, std::vector<Bucket> messages)
      : lane(std::move(communicator), divisor), messages(std::move(messages)) {}

  void begin(GradientLane::Caller caller) {
    missing.clear();
    for (const auto& members : messages) missing.push_back(members.size());
    lane.begin(messages.size(), caller);
  }

  GradientLane lane;
  std::vector<Bucket> messages;
  std::vector<size_t> missing;  ///< gradients, of each message
};

struct Place {
  Way* way = nullptr;  ///< none: nothing is summed
  size_t message = 0;
};

/// Of sums over a group split from `world`, beside a backward that calls `world` and other groups of its.
GradientLane::Caller caller_beside(const std::vector<ParallelParameter>& parameters,
                                   const Communicator& world) {
  auto order = SplitOrder::kAny;
  for (const auto& parameter : parameters) {
    order = std::max(order, world.split_order(parameter.tensor.device()));
  }
  switch (order) {
    case SplitOrder::kAny:
      return GradientLane::Caller::kThread;
    case SplitOrder::kBestOne:
      return GradientLane::Caller::kSend;
    case SplitOrder::kOne:
      break;  // ranks may differ in which gradients backward reaches
  }
  return GradientLane::Caller::kEnd;
}

}  // namespace

/// One model's step. Hooks call it from threads of autograd's.
class GradientReducer::Step {
 public:
  Step(std::vector<ParallelParameter> parameters, Communicator& world,
       Communicator& expert_replicas, int64_t bucket_bytes);
  ~Step() { remove_hooks(); }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  void start();
  torch::Tensor finish(const std::vector<torch::Tensor>& beside);
  int64_t summed() const;

 private:
  struct Member {
    ParallelParameter parameter;
    Place place;
    Accumulator accumulator;
    uintptr_t hook = 0;
    torch::Tensor gradient;  ///< as taken in this step
    int64_t version = 0;     ///< of it
  };

  std::unique_ptr<Way> way(bool of_experts, Communicator& group, int64_t bucket_bytes);
  void add_hooks();
  void remove_hooks();
  void after_accumulation(size_t member);
  void take(Member& member, const torch::Tensor& gradient);
  std::vector<torch::Tensor> gradients(bool of_experts) const;
  void send_last(const std::vector<torch::Tensor>& beside, const torch::Tensor& not_finite);
  void end_lanes();
  void check_unchanged() const;
  void bring_back(const std::vector<torch::Tensor>& experts);

  int64_t ranks_;
  GradientLane::Caller caller_;
  std::vector<Member> members_;
  std::unique_ptr<Way> world_;     ///< none: a rank alone
  std::unique_ptr<Way> replicas_;  ///< none: each expert is held once
  std::mutex mutex_;
  bool started_ = false;
};

GradientReducer::Step::Step(std::vector<ParallelParameter> parameters, Communicator& world,
                            Communicator& expert_replicas, int64_t bucket_bytes)
    : ranks_(world.size()), caller_(caller_beside(parameters, world)) {
  check_input(bucket_bytes > 0, "bucket_bytes must be positive, got ", bucket_bytes);
  for (auto& parameter : parameters) {
    check_input(parameter.tensor.is_leaf() && parameter.tensor.requires_grad(),
                "GradientReducer: ", parameter.name, " is no leaf that requires a gradient");
    members_.emplace_back().parameter = std::move(parameter);
  }
  if (ranks_ == 1) return;
  world_ = way(/*of_experts=*/false, world, bucket_bytes);
  if (expert_replicas.size() > 1) {
    replicas_ = way(/*of_experts=*/true, expert_replicas, bucket_bytes);
  }
  add_hooks();
}

/// Over a group of its own of the same ranks. Collective.
std::unique_ptr<Way> GradientReducer::Step::way(bool of_experts, Communicator& group,
                                                int64_t bucket_bytes) {
  std::vector<size_t> numbers;
  std::vector<torch::Tensor> like;
  for (size_t number = 0; number < members_.size(); ++number) {
    const auto& parameter = members_[number].parameter;
    if (parameter.is_expert != of_experts) continue;
    numbers.push_back(number);
    like.push_back(parameter.main_grad.defined() ? parameter.main_grad : parameter.tensor);
  }
  auto messages = make_buckets(like, bucket_bytes);
  for (auto& message : messages) {
    for (auto& member : message) member = numbers[member];
  }
  if (!of_experts && messages.empty()) messages.emplace_back();  // what goes in the last message
  return std::make_unique<Way>(group.split(0, group.rank()), ranks_, std::move(messages));
}

void GradientReducer::Step::add_hooks() {
  for (auto* way : {world_.get(), replicas_.get()}) {
    for (size_t message = 0; way != nullptr && message < way->messages.size(); ++message) {
      for (const size_t number : way->messages[message]) members_[number].place = {way, message};
    }
  }
  for (size_t number = 0; number < members_.size(); ++number) {
    auto& member = members_[number];
    member.accumulator = torch::autograd::impl::grad_accumulator(member.parameter.tensor);
    member.hook = member.accumulator->add_post_hook(
        std::make_unique<AfterAccumulation>([this, number] { after_accumulation(number); }));
  }
}

void GradientReducer::Step::remove_hooks() {
  for (auto& member : members_) {
    if (member.accumulator) member.accumulator->del_post_hook(member.hook);
  }
}

void GradientReducer::Step::start() {
  check_input(!started_,
              "GradientReducer: start again before finish, which goes between, also after "
              "a backward that has thrown");
  if (ranks_ > 1) {
    std::vector<torch::Tensor> experts;
    for (const auto& member : members_) {
      const auto& gradient = member.parameter.gradient();
      if (member.parameter.is_expert && gradient.defined()) experts.push_back(gradient);
    }
    check_unfinished(experts);
  }
  for (auto& member : members_) member.gradient.reset();
  for (auto* way : {world_.get(), replicas_.get()}) {
    if (way != nullptr) way->begin(caller_);
  }
  started_ = true;
}

void GradientReducer::Step::after_accumulation(size_t number) {
  const std::scoped_lock lock(mutex_);
  auto& member = members_[number];
  const auto& gradient = member.parameter.gradient();
  // One that has been taken before is found to have changed by `finish`, on every rank.
  if (!started_ || member.gradient.defined() || !gradient.defined()) return;
  if (gradient.layout() == at::kStrided) take(member, gradient);
}

void GradientReducer::Step::take(Member& member, const torch::Tensor& gradient) {
  member.gradient = gradient;
  member.version = gradient._version();
  const auto [way, message] = member.place;
  if (way == nullptr) return;
  way->lane.note(message, gradient.device());
  const bool is_last = way == world_.get() && message + 1 == way->messages.size();
  if (--way->missing[message] > 0 || is_last) return;
  std::vector<torch::Tensor> together;
  for (const size_t number : way->messages[message]) together.push_back(members_[number].gradient);
  way->lane.send(message, std::move(together));
}

std::vector<torch::Tensor> GradientReducer::Step::gradients(bool of_experts) const {
  std::vector<torch::Tensor> found;
  for (const auto& member : members_) {
    if (member.parameter.is_expert == of_experts) found.push_back(member.gradient);
  }
  return found;
}

void GradientReducer::Step::send_last(const std::vector<torch::Tensor>& beside,
                                      const torch::Tensor& not_finite) {
  std::vector<torch::Tensor> together;
  for (const size_t number : world_->messages.back()) {
    together.push_back(members_[number].gradient);
  }
  together.insert(together.end(), beside.begin(), beside.end());
  together.push_back(not_finite);
  world_->lane.send(world_->messages.size() - 1, std::move(together));
}

/// Both, whatever happens to one.
void GradientReducer::Step::end_lanes() {
  std::exception_ptr failure;
  for (auto* way : {world_.get(), replicas_.get()}) {
    try {
      if (way != nullptr) way->lane.end();
    } catch (const std::exception&) {
      if (failure == nullptr) failure = std::current_exception();
    }
  }
  if (failure != nullptr) std::rethrow_exception(failure);
}

void GradientReducer::Step::check_unchanged() const {
  for (const auto& member : members_) {
    const auto& gradient = member.parameter.gradient();
    check_input(gradient.is_same(member.gradient) && gradient._version() == member.version,
                "GradientReducer: the gradient of ", member.parameter.name,
                " has changed since it was taken to be summed: start goes before the last backward "
                "of a step, finish behind it, and whatever else reads or changes gradients after "
                "that");
  }
}

void GradientReducer::Step::bring_back(const std::vector<torch::Tensor>& experts) {
  world_->lane.bring_back();
  if (replicas_) {
    replicas_->lane.bring_back();
  } else {
    for (const auto& gradient : experts) gradient.div_(ranks_);
  }
}

torch::Tensor GradientReducer::Step::finish(const std::vector<torch::Tensor>& beside) {
  check_input(started_,
              "GradientReducer: finish without start, which goes before the last "
              "backward of a step");
  check_late_refusals();
  const at::NoGradGuard no_grad;
  {
    const std::scoped_lock lock(mutex_);
    for (auto& member : members_) {
      const auto gradient = gradient_of(member.parameter);
      if (!member.gradient.defined()) take(member, gradient);
    }
  }
  const auto experts = gradients(/*of_experts=*/true);
  const auto replicated = gradients(/*of_experts=*/false);
  started_ = false;
  if (ranks_ == 1) return nan_unless_finite({}, replicated);
  const auto not_finite = nan_unless_finite(experts, replicated);
  send_last(beside, not_finite);
  end_lanes();
  check_unchanged();
  bring_back(experts);
  tell(not_finite, experts, replicated);
  mark_finished(experts);
  for (auto& member : members_) member.gradient.reset();
  return not_finite;
}

int64_t GradientReducer::Step::summed() const {
  int64_t summed = 0;
  for (const auto* way : {world_.get(), replicas_.get()}) {
    if (way != nullptr) summed += way->lane.summed();
  }
  return summed;
}

GradientReducer::GradientReducer(const torch::nn::Module& model, const ParallelGroups& groups,
                                 int64_t bucket_bytes)
    : GradientReducer(
          [&] {
            auto parameters = parallel_parameters(model, groups);
            std::erase_if(parameters,
                          [](const auto& parameter) { return !parameter.tensor.requires_grad(); });
            return parameters;
          }(),
          *groups.world, *groups.expert_replicas, bucket_bytes) {}

GradientReducer::GradientReducer(std::vector<ParallelParameter> parameters, Communicator& world,
                                 Communicator& expert_replicas, int64_t bucket_bytes)
    : step_(std::make_unique<Step>(std::move(parameters), world, expert_replicas, bucket_bytes)) {}

GradientReducer::~GradientReducer() = default;

void GradientReducer::start() { step_->start(); }

torch::Tensor GradientReducer::finish(const std::vector<torch::Tensor>& beside) {
  return step_->finish(beside);
}

int64_t GradientReducer::summed() const { return step_->summed(); }

}  // namespace anabranch
