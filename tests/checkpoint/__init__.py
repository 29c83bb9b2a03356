"""Checkpoints: saved, resumed, resharded, converted and preloaded, malformed files, and those of earlier releases."""
