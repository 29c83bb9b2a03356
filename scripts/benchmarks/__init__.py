"""Measurements of speed, traffic and reliability, and the page of performance."""
