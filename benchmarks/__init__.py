"""Benchmarks: correctness first, then time and memory, peers in the same run; results under ``results/<gpu>/``."""
