"""Benchmarks of this project and its peers, side by side: ``python -m experiments.bench NAME``."""
