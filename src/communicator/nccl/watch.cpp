#include "communicator/nccl/watch.h"

#include <anabranch/error.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

namespace anabranch {
namespace {

constexpr std::chrono::milliseconds kGlance{10};
constexpr std::chrono::milliseconds kLongestHeartbeat{1000};

bool has_ended(cudaEvent_t event) {
  const cudaError_t status = cudaEventQuery(event);
  if (status == cudaErrorNotReady) {
    return false;
  }
  check_cuda(status, "cudaEventQuery");
  return true;
}

CudaEvent recorded(cudaStream_t stream) {
  CudaEvent event = make_cuda_event();
  check_cuda(cudaEventRecord(event, stream), "cudaEventRecord");
  return event;
}

}  // namespace

std::chrono::milliseconds NcclWatch::heartbeat_for(std::chrono::milliseconds deadline) {
  return std::min(kLongestHeartbeat, deadline / 16);
}

NcclWatch::NcclWatch(NcclGroup& group, NcclHeartbeats& heartbeats, const NcclFamily& family,
                     int device, std::chrono::milliseconds deadline,
                     std::function<void()> on_failure)
    : group_(group),
      heartbeats_(heartbeats),
      family_(family),
      deadline_(deadline),
      heartbeat_(heartbeat_for(deadline)),
      on_failure_(std::move(on_failure)),
      follower_([this, device] { follow_streams(device); }),
      watcher_([this] { watch(); }) {}

NcclWatch::~NcclWatch() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  follower_.join();
  watcher_.join();
}

void NcclWatch::check() {
  const std::lock_guard lock(mutex_);
  if (failure_.has_value()) {
    throw CommunicationError(failure_->text, failure_->culprits);
  }
}

void NcclWatch::run(const char* name, cudaStream_t stream,
                    const std::function<void(ncclComm_t)>& calls) {
  std::unique_lock group_lock(group_mutex_);
  check();
  if (is_recorded(stream)) {  // nobody can ask how far it is: a replay is not in the watch's sight
    group_.launch(calls);
    const std::lock_guard lock(mutex_);
    recorded_ = true;
    return;
  }
  CudaEvent begin = recorded(stream);
  std::unique_lock lock(mutex_);
  const int64_t sequence = ++started_;
  launching_ = Launch{name, sequence, lived_.now()};
  lock.unlock();
  std::optional<CudaEvent> end;
  std::string error;
  try {
    group_.launch(calls);
    end.emplace(recorded(stream));
  } catch (const std::runtime_error& failed) {
    error = failed.what();
  }
  group_lock.unlock();
  lock.lock();
  launching_.reset();
  if (end.has_value()) {
    running_.push_back({name, sequence, std::move(begin), std::move(*end), std::nullopt});
    return;
  }
  trouble_ = Trouble{c10::str(name, ": ", error), sequence, sequence};
  changed_.wait(lock, [&] { return failure_.has_value(); });
  lock.unlock();
  check();
}

void NcclWatch::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return running_.empty() || failure_.has_value(); });
  // NCCL's own way of leaving has no limit: it waits for a rank that keeps its group, or is dead. It is taken where
  // nobody can tell how far the others are.
  const bool by_nccl = recorded_ || !heartbeats_.obstacle().empty();
  if (!by_nccl) {
    leaving_ = true;
    changed_.wait(lock, [&] { return all_ended_ || failure_.has_value(); });
  }
  lock.unlock();
  check();
  const std::lock_guard group_lock(group_mutex_);
  by_nccl ? group_.finalize() : group_.abort();
}

bool NcclWatch::pause() {
  std::unique_lock lock(mutex_);
  return !changed_.wait_for(lock, kGlance, [&] { return stop_; });
}

void NcclWatch::follow_streams(int device) {
  static_cast<void>(cudaSetDevice(device));  // its events' own calls will tell
  // Else a question about an event invalidates the capture of a graph that another thread has under way.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode));
  while (pause()) {
    try {
      look_at_streams();
    } catch (const std::runtime_error& error) {  // of this rank's own GPU
      const std::lock_guard lock(mutex_);
      trouble_ = Trouble{error.what(), started_, started_};
    }
    const std::lock_guard lock(mutex_);
    looked_ = lived_.now();
  }
}

/// Nothing of CUDA's is called while the mutex is held. Only this thread takes collectives away.
void NcclWatch::look_at_streams() {
  std::unique_lock lock(mutex_);
  while (!running_.empty() && !failure_.has_value()) {
    Collective& oldest = running_.front();
    lock.unlock();
    const bool begun = oldest.begun.has_value() || has_ended(oldest.begin);
    const bool ended = begun && has_ended(oldest.end);
    lock.lock();
    if (begun && !oldest.begun.has_value()) {
      oldest.begun = lived_.now();
    }
    if (!ended) {
      break;
    }
    {
      const Collective done = std::move(oldest);
      running_.pop_front();
      changed_.notify_all();
      lock.unlock();
    }  // its events are destroyed
    lock.lock();
  }
}

void NcclWatch::watch() {
  while (pause()) {
    lived_.advance();
    exchange_signs();
    hear_of_failures();
    if (const auto trouble = look()) {
      fail(*trouble);
    }
  }
}

void NcclWatch::exchange_signs() {
  std::unique_lock lock(mutex_);
  const int64_t started = started_;
  const int64_t ended = started - std::ssize(running_) - (launching_.has_value() ? 1 : 0);
  const bool leaving = leaving_;
  lock.unlock();
  const bool says_good_bye = leaving && !std::exchange(said_good_bye_, true);
  if (lived_.now() >= next_sign_ || says_good_bye) {
    for (int i = 0; i < (says_good_bye ? NcclHeartbeats::kRepeats : 1); ++i) {
      heartbeats_.publish(started, ended);
    }
    next_sign_ = lived_.now() + heartbeat_;
  }
  heartbeats_.listen();
  if (leaving && heartbeats_.all_have_ended(ended, deadline_ / heartbeat_)) {
    lock.lock();
    all_ended_ = true;
    changed_.notify_all();
  }
}

/// Of this group's on other ranks, and of this rank's in other groups.
void NcclWatch::hear_of_failures() {
  std::unique_lock lock(mutex_);
  if (failure_.has_value()) {
    return;
  }
  lock.unlock();
  if (heartbeats_.announced().has_value()) {
    end_with(*heartbeats_.announced());
  } else if (const auto failure = family_.failure()) {
    announce(*failure);
  }
}

std::optional<NcclWatch::Trouble> NcclWatch::look() {
  std::unique_lock lock(mutex_);
  if (failure_.has_value()) {
    return std::nullopt;
  }
  if (trouble_.has_value()) {
    return trouble_;
  }
  const auto now = lived_.now();
  if (launching_.has_value() && now - launching_->begun > deadline_) {
    return Trouble{
        c10::str(launching_->name, " was not launched within ", deadline_.count(), " ms"),
        launching_->sequence, launching_->sequence};
  }
  if (running_.empty()) {
    return std::nullopt;
  }
  const Collective& oldest = running_.front();
  if (oldest.begun.has_value() && now - *oldest.begun > deadline_) {
    return Trouble{c10::str(oldest.name, " did not end within ", deadline_.count(), " ms"),
                   oldest.sequence, oldest.sequence};
  }
  if (now - looked_ > deadline_) {
    return Trouble{c10::str("CUDA has not said for ", deadline_.count(), " ms whether ",
                            oldest.name, " has ended, or what was called after it"),
                   oldest.sequence, started_};
  }
  const int64_t sequence = oldest.sequence;
  const std::string name = oldest.name;
  lock.unlock();
  // Not while another thread launches, which asks by itself.
  if (const std::unique_lock group_lock(group_mutex_, std::try_to_lock); group_lock) {
    const std::string error = group_.asynchronous_error();
    if (!error.empty()) {
      return Trouble{c10::str(name, " failed: ", error), sequence, sequence};
    }
  }
  return std::nullopt;
}

void NcclWatch::fail(const Trouble& trouble) {
  NcclFailure failure{c10::str("rank ", heartbeats_.rank(), ": ", trouble.reason),
                      heartbeats_.missing(trouble.first, trouble.last, heartbeat_)};
  failure.text += blame(failure.culprits, heartbeats_);
  announce(failure);
}

void NcclWatch::announce(const NcclFailure& failure) {
  heartbeats_.announce(failure);
  end_with(failure);
}

/// A kernel that is aborted may send what ends another rank's collective as if it were whole. So nobody aborts
/// before all ranks have had the time to hear of the failure, which their `check` then tells.

void NcclWatch::end_with(const NcclFailure& failure) {
  {
    const std::lock_guard lock(mutex_);
    failure_ = failure;
  }
  family_.report(failure);
  std::this_thread::sleep_for(heartbeat_);
  on_failure_();
  // Without the lock where a launch that waits for a peer holds it: aborting is what ends that launch.
  const std::unique_lock group_lock(group_mutex_, heartbeat_);
  group_.abort();
  changed_.notify_all();
}

}  // namespace anabranch
