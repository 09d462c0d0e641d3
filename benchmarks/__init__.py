"""Benchmarks: correctness first, then time and memory, peers in the same run; results under ``results/<gpu>/``."""

#: Whose results, a directory of ``results/``, the README shows: one that has been measured on the newest code.
GPU = "nvidia-h200"
#: Whose it showed before; where that is another one, the README points at the older figures.
GPU_BEFORE = "nvidia-h100-80gb-hbm3"
