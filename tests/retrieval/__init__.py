"""Nearest-neighbour search over stored rows, in training and in checkpoints."""
