#include "interrupt.h"

#include <cerrno>
#include <csignal>
#include <system_error>

namespace train_lm {
namespace {

volatile std::sig_atomic_t pending_signal = 0;

// USR1 is the one signal that mpirun passes on to the ranks of all machines.
extern "C" void remember_signal(int signal) {
  pending_signal = signal == SIGUSR1 ? SIGTERM : signal;
}

}  // namespace

void remember_interrupts() {
  struct sigaction action = {};
  action.sa_handler = remember_signal;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) {
    if (sigaction(signal, &action, nullptr) != 0) {
      throw std::system_error(errno, std::generic_category(), "sigaction");
    }
  }
}

int pending_interrupt() noexcept { return pending_signal; }

}  // namespace train_lm
