#pragma once

namespace train_lm {

/// From now on SIGINT and SIGTERM are remembered instead of ending the process.
void remember_interrupts();

/// The latest such signal's number, or 0.
int pending_interrupt() noexcept;

}  // namespace train_lm
