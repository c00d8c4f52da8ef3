#include "registry.h"

#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

#include "options.h"
#include "support/check.h"

namespace anabranch::operators {
namespace {

/// What has been made so far, of one kind. What is there is found by a key's view, without a copy of strings.
template <typename Key, typename Value>
class Made {
 public:
  template <typename View, typename Make>
  std::shared_ptr<Value> get(const View& key, const Make& make) {
    const std::scoped_lock lock(mutex_);
    auto found = entries_.find(key);
    if (found == entries_.end()) {
      found = entries_.emplace(Key(key), make()).first;
    }
    return found->second;
  }
  template <typename Condition>
  void forget(const Condition& condition) {
    const std::scoped_lock lock(mutex_);
    std::erase_if(entries_, [&](const auto& entry) { return condition(entry.first); });
  }

 private:
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<Value>, std::less<>> entries_;
};

/// Group first; the device by its kind and number.
using FunctionKey = std::tuple<std::string, std::string, torch::Dtype, torch::DeviceType, int>;
using FunctionView =
    std::tuple<std::string_view, std::string_view, torch::Dtype, torch::DeviceType, int>;
using ExchangeKey = std::tuple<std::string, int64_t>;
using ExchangeView = std::tuple<std::string_view, int64_t>;

struct Registry {
  Made<std::string, Communicator> groups;
  Made<FunctionKey, const MoEFunction> functions;
  Made<ExchangeKey, const Exchange> exchanges;
  Made<std::tuple<std::string, std::string>, GroupedGemmEngine> engines;
};

/// Never destroyed: LibTorch, MPI and CUDA may be gone by then.
Registry& registry() {
  static auto* const only = new Registry;
  return *only;
}

}  // namespace

std::string register_group(const std::string& name, std::shared_ptr<Communicator> communicator) {
  release_group(name);
  registry().groups.get(name, [&] { return std::move(communicator); });
  return name;
}

void release_group(const std::string& name) {
  const auto of_group = [&](const auto& key) { return std::get<0>(key) == name; };
  registry().functions.forget(of_group);
  registry().exchanges.forget(of_group);
  registry().groups.forget([&](const std::string& key) { return key == name; });
}

std::shared_ptr<Communicator> group_named(const std::string& name) {
  return registry().groups.get(name, [&]() -> std::shared_ptr<Communicator> {
    throw InputError("there is no group '" + name +
                     "': it was released, or its process group destroyed and another made in its "
                     "place. Make the layer anew, over ranks that are there");
  });
}

std::shared_ptr<const MoEFunction> function_for(const std::string& options,
                                                const std::string& group, torch::Dtype dtype,
                                                torch::Device device) {
  const FunctionView key(group, options, dtype, device.type(), device.index());
  return registry().functions.get(key, [&] {
    auto all = options_from_json(options);
    all.dtype = dtype;
    all.device = device;
    return std::make_shared<const MoEFunction>(all, group_named(group));
  });
}

std::shared_ptr<const Exchange> exchange_for(const std::string& group, int64_t num_experts) {
  return registry().exchanges.get(ExchangeView(group, num_experts), [&] {
    return std::make_shared<const Exchange>(group_named(group), num_experts);
  });
}

std::shared_ptr<GroupedGemmEngine> engine_for(torch::Device device, const std::string& name) {
  return registry().engines.get(std::tuple(device.str(), name),
                                [&] { return make_grouped_gemm_engine(device, name); });
}

}  // namespace anabranch::operators
