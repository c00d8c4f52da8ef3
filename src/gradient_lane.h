#pragma once

#include <anabranch/communicator.h>
#include <c10/core/Event.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "gradient_means.h"

namespace anabranch {

/// What streams of a device had been given when they were noted.
class NotedStreams {
 public:
  /// The current one, where the device has any.
  void note(c10::Device device);
  /// `then` waits for all that was noted.
  void block(const c10::Stream& then);

 private:
  std::vector<std::pair<c10::Stream, c10::Event>> noted_;
};

/// Averages a step's messages over one communicator, each when it is complete and all before it are done, on a GPU
/// on a stream of its own. Its calls are made by one thread at a time.
class GradientLane {
 public:
  /// Who makes the communicator's calls.
  enum class Caller {
    kEnd,
    kThread,  ///< beside who completes the messages
    kSend,    ///< in its order with their other calls
  };

  /// The communicator is used by nobody else.
  GradientLane(std::shared_ptr<Communicator> communicator, int64_t divisor);
  /// Gives up messages that are not complete, and waits for what is under way.
  ~GradientLane();
  GradientLane(const GradientLane&) = delete;
  GradientLane& operator=(const GradientLane&) = delete;

  int size() const { return communicator_->size(); }

  /// A step of so many messages.
  void begin(size_t messages, Caller caller);
  /// The `message`th will hold a gradient that is final in the current stream's order.
  void note(size_t message, c10::Device device);
  /// The `message`th is complete: these gradients, which stay as they are until `end`.
  void send(size_t message, std::vector<torch::Tensor> gradients);
  /// All messages are complete. Waits on the host until they have been averaged or are on their stream, and orders
  /// the current stream behind them. Throws what has failed.
  void end();
  /// Gradients become what has been averaged. After `end`.
  void bring_back();

  int64_t summed() const { return summed_; }

 private:
  struct Slot {
    NotedStreams noted;
    std::vector<torch::Tensor> gradients;
    bool is_complete = false;
  };
  void work();
  void average_complete();
  void average(Slot& slot);
  void join();

  std::shared_ptr<Communicator> communicator_;
  int64_t divisor_;
  std::optional<c10::Stream> stream_;  ///< once a message is on a GPU
  Caller caller_ = Caller::kEnd;
  std::vector<Slot> slots_;
  std::vector<MeanMessage> averaged_;
  std::exception_ptr failure_;  ///< of a call in `send`
  std::mutex mutex_;            ///< guards is_complete and given_up_
  std::condition_variable changed_;
  bool given_up_ = false;
  std::atomic<int64_t> summed_ = 0;
  std::future<void> working_;
};

}  // namespace anabranch
