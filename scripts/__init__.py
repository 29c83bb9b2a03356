"""Benchmarks, studies, recipes and examples; each module is run as `python -m scripts.<package>.<module>`."""
