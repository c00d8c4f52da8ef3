#pragma once

#include <c10/core/Device.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "support/moment.h"

namespace anabranch {

/// How long the stages of a layer take: on the host, or on a GPU between what a stage puts on the
/// current stream. A stage within another counts in both.
class StageTimes {
 public:
  /// While this lives, the stages that this thread runs are added to `times`, which may be null.
  class Measuring {
   public:
    Measuring(StageTimes* times, c10::Device device);
    ~Measuring();
    Measuring(const Measuring&) = delete;
    Measuring& operator=(const Measuring&) = delete;

   private:
    StageTimes* former_;
    std::optional<c10::Device> former_device_;
  };

  /// One stage from construction to destruction; nothing where the thread measures none.
  class Measured {
   public:
    explicit Measured(const char* name);
    ~Measured();
    Measured(const Measured&) = delete;
    Measured& operator=(const Measured&) = delete;

   private:
    StageTimes* times_;
    const char* name_;
    std::optional<c10::Device> device_;
    std::optional<Moment> begin_;
  };

  /// Seconds by stage since the last reset. Waits for stages that a GPU has not ended.
  std::map<std::string, double> seconds();
  void reset();

 private:
  struct OnDevice {
    const char* name;
    Moment begin;
    Moment end;
  };

  void add(const char* name, double seconds);
  void add(OnDevice stage);

  std::mutex mutex_;
  std::map<std::string, double> seconds_;
  std::vector<OnDevice> on_device_;  ///< ended or not, not yet in seconds_
};

}  // namespace anabranch
