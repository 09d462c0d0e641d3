"""One run on one GPU: its ceilings, the layer at hand, and the rows so far."""

import functools
import gc
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from moe_kernels.bench import ceilings, results
from moe_kernels.bench.layer import Layer
from moe_kernels.bench.machine import machine
from moe_kernels.bench.shapes import Shape


class Session:
    def __init__(self, device: str = "cuda"):
        if forced := os.environ.get("MOE_KERNELS_BACKEND"):
            raise ValueError(f"MOE_KERNELS_BACKEND must be unset: what is picked is measured, got {forced!r}")
        self.device = device
        self.rows: dict[str, dict[str, dict]] = {}  # file -> name -> row
        self._layer: Layer | None = None

    @functools.cached_property
    def bytes_per_second(self) -> float:
        return ceilings.copy_rate()

    @functools.cached_property
    def machine(self) -> dict:
        """What the rows were measured on; with the ceilings, so a line belongs to one run."""
        rates = {"copy_tb_per_s": self.bytes_per_second / 1e12, "matmul_tflops": ceilings.matmul_rate() / 1e12}
        return machine() | {name: rounded(rate) for name, rate in rates.items()}

    def layer(self, shape: Shape) -> Layer:
        """The layer of this shape; one is alive at a time."""
        if self._layer is None or self._layer.shape != shape:
            self.release()
            self._layer = Layer(shape, self.device)
        return self._layer

    def release(self) -> None:
        """Give the layer's memory back."""
        self._layer = None
        gc.collect()  # a layer refers to itself
        torch.cuda.empty_cache()

    def bound(self, shape: Shape, kind: str, times: Mapping[str, float]) -> dict[str, float]:
        """t_b of this shape and routing, from the times of its products."""
        padded = ceilings.padding(self.layer(shape).rows_per_expert(kind))
        return ceilings.bound(shape, times, padded, self.bytes_per_second)

    def record(self, file: str, name: str, row: dict) -> dict:
        """Keep a row, its figures rounded to what can mean something."""
        row = {key: rounded(value) for key, value in row.items()}
        self.rows.setdefault(file, {})[name] = row
        return row

    def find(self, file: str, name: str) -> dict | None:
        """A row of this run."""
        return self.rows.get(file, {}).get(name)

    def save(self, directory: Path) -> list[Path]:
        """Put the rows into the files of ``directory``, beside the ones that are there; the files written."""
        for file, rows in self.rows.items():
            results.save(directory / file, rows, self.machine)
        return [directory / file for file in self.rows]


def rounded(value):
    """Floats to five significant digits."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
