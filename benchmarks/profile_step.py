"""One forward and backward of a layer's experts, and the bare products of its bound, for a profiler.

    ncu --profile-from-start off --clock-control none --set full -o step python -m benchmarks.profile_step qwen3-30b
    ncu --import step.ncu-rep --page details

The profiler is told to begin after two steps that warm up. ``docs/kernels.md`` has what it showed last.
"""

import argparse

import torch

from moe_kernels.bench import ceilings
from moe_kernels.bench.session import Session
from moe_kernels.bench.shapes import DEFAULT_SHAPES, SHAPES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", default=DEFAULT_SHAPES[0], choices=SHAPES, metavar="SHAPE")
    shape = SHAPES[parser.parse_args(arguments).shape]
    layer = Session().layer(shape)
    forward = layer.forward("experts", "uniform", "moe_kernels")
    products = ceilings.products(shape)
    for profiled in (False, False, True):
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.cudart().cudaProfilerStart()
        forward().backward(layer.d_out)
        for product in products.values():
            product()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
