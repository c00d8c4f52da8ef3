#include "support/observer.h"

#include <utility>

namespace anabranch {
namespace {

thread_local std::shared_ptr<const Observer> of_thread;

}  // namespace

ObservedBackward::ObservedBackward(Observer observer)
    : former_(std::exchange(of_thread, std::make_shared<const Observer>(std::move(observer)))) {}

ObservedBackward::~ObservedBackward() { of_thread = std::move(former_); }

std::shared_ptr<const Observer> backward_observer() { return of_thread; }

}  // namespace anabranch
