"""What metrics.jsonl has of the machine, and not of the training: times, rates, memory."""

OF_THE_MACHINE = {
    "data_seconds",
    "exposed_communication_seconds",
    "memory",
    "mfu",
    "model_tflops",
    "rank_milliseconds",
    "seconds",
    "step_seconds",
    "tokens_per_second",
}


def without_the_machine(record):
    return {name: value for name, value in record.items() if name not in OF_THE_MACHINE}
