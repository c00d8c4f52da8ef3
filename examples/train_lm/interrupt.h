#pragma once

namespace train_lm {

/// From now on SIGINT, SIGTERM and SIGUSR1 are remembered instead of ending the process; SIGUSR1, the
/// usual warning of a scheduler, as SIGTERM.
void remember_interrupts();

/// The latest such signal's number, or 0.
int pending_interrupt() noexcept;

}  // namespace train_lm
