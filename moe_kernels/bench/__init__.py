"""How the library is measured: shapes, clocks, the bound, peers. ``moe-kernels bench`` and ``benchmarks/`` share it."""
