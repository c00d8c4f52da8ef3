"""What a training loop does with a model's layers: gradients, steps, balance, checkpoints."""
