"""Continual pre-training of a language model, and its page."""
