#include "gradient_lane.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "support/beside.h"

namespace anabranch {
namespace {

c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace

void NotedStreams::note(c10::Device device) {
  if (device.is_cpu()) return;
  const auto stream = current_stream(device);
  auto found = std::find_if(noted_.begin(), noted_.end(),
                            [&](const auto& entry) { return entry.first == stream; });
  if (found == noted_.end()) {
    found = noted_.emplace(found, stream, c10::Event(device.type()));
  }
  found->second.record(stream);
}

void NotedStreams::block(const c10::Stream& then) {
  for (auto& [stream, event] : noted_) event.block(then);
}

GradientLane::GradientLane(std::shared_ptr<Communicator> communicator, int64_t divisor)
    : communicator_(std::move(communicator)), divisor_(divisor) {}

GradientLane::~GradientLane() {
  {
    const std::scoped_lock lock(mutex_);
    given_up_ = true;
  }
  changed_.notify_all();
  if (working_.valid()) working_.wait();
}

void GradientLane::begin(size_t messages, Caller caller) {
  if (!averaged_.empty()) join();  // of a step that has failed: what it reads is free then
  caller_ = caller;
  slots_ = std::vector<Slot>(messages);
  averaged_.clear();
  summed_ = 0;
  failure_ = nullptr;
  if (caller == Caller::kThread && messages > 0) {
    working_ = anabranch::beside([this] { work(); });
  }
}

void GradientLane::note(size_t message, c10::Device device) { slots_[message].noted.note(device); }

void GradientLane::send(size_t message, std::vector<torch::Tensor> gradients) {
  auto& slot = slots_[message];
  slot.noted.note(gradients.front().device());
  slot.gradients = std::move(gradients);
  {
    const std::scoped_lock lock(mutex_);
    slot.is_complete = true;
  }
  changed_.notify_all();
  if (caller_ == Caller::kSend) average_complete();
}

void GradientLane::work() {
  for (auto& slot : slots_) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return slot.is_complete || given_up_; });
      if (!slot.is_complete) return;
    }
    average(slot);
  }
}

/// Those whose turn it is. What fails is `end`'s to throw: the backward that completes a message goes on.
void GradientLane::average_complete() {
  try {
    while (failure_ == nullptr && averaged_.size() < slots_.size() &&
           slots_[averaged_.size()].is_complete) {
      average(slots_[averaged_.size()]);
    }
  } catch (const std::exception&) {
    failure_ = std::current_exception();
  }
}

void GradientLane::average(Slot& slot) {
  const at::NoGradGuard no_grad;
  const auto device = slot.gradients.front().device();
  if (!device.is_cpu()) {
    if (!stream_) {
      // High: a sum that other ranks wait for does not stand behind what this rank computes.
      stream_ = c10::impl::VirtualGuardImpl(device.type())
                    .getStreamFromGlobalPool(device, /*isHighPriority=*/true);
    }
    slot.noted.block(*stream_);
  }
  const c10::OptionalStreamGuard guard(stream_);
  averaged_.emplace_back(std::move(slot.gradients));
  averaged_.back().average(*communicator_, divisor_);
  ++summed_;
}

void GradientLane::end() {
  if (working_.valid()) {
    working_.get();
  } else {
    average_complete();
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }
  join();
}

/// Orders the current stream behind the lane's.
void GradientLane::join() {
  if (!stream_) return;
  NotedStreams done;
  {
    const c10::StreamGuard guard(*stream_);
    done.note(stream_->device());
  }
  done.block(current_stream(stream_->device()));
}

void GradientLane::bring_back() {
  for (const auto& message : averaged_) message.bring_back();
  if (stream_) {  // whose memory the messages are
    NotedStreams back;
    back.note(stream_->device());
    back.block(*stream_);
  }
  averaged_.clear();
}

}  // namespace anabranch
