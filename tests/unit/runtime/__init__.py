"""What runs beside the training loop: losses, guard, ratio and the cost model."""
