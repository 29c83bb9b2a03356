"""Losses of the strategies, by hand and in replay."""
