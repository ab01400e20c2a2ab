"""What moves the weights: optimizers and schedules of the learning rate."""
