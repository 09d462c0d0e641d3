"""Compile the Triton kernels of ops for one architecture, without a GPU: ``aot_compile.py 90 gate_up combine``.

Calls the op's backend function on CPU tensors with the launcher replaced by one that compiles: what is compiled is the
very launch a GPU of that architecture would get, specialised by Triton's own binder. Prints one JSON line per launch.
Run in a process of its own: where TRITON_INTERPRET is set, ``@triton.jit`` makes no kernels to compile.
"""

import argparse
import importlib
import json
import re
import subprocess
import tempfile
import time
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from moe_kernels.backends.triton import _launch, configs

# Divisibility is all that the kernels see of these sizes: multiples of every tile, as real models have them.
T, K, E, D, I = 64, 8, 2, 512, 512  # noqa: E741


#: Routers by name: experts, experts per token, whether a bias chooses, the rest of topk_route's arguments by name.
ROUTERS = {
    "qwen3": (128, 8, False, {"renormalize": True}),
    "gpt-oss": (32, 4, False, {"score_after_topk": True, "weights_dtype": torch.bfloat16}),
    "deepseek-v2": (160, 6, False, {"num_groups": 8, "top_groups": 3, "group_score": "max", "losers_zero": True}),
    "deepseek-v3": (256, 8, True, {"scoring": "sigmoid", "renormalize": True, "num_groups": 8, "top_groups": 4}),
    "nemotron-3": (512, 22, True, {"scoring": "sigmoid", "renormalize": True}),
    "mistral-4": (128, 4, False, {"num_groups": 4, "top_groups": 2, "round_scores": True}),
    "largest": (1024, 32, True, {"renormalize": True, "min_sum": 1e-12, "num_groups": 8, "top_groups": 4}),
    "everything": (
        1024,
        32,
        True,
        {
            "scoring": "sqrtsoftplus", "renormalize": True, "num_groups": 8, "top_groups": 4, "losers_zero": True,
            "soft_cap": 5.0, "round_scores": True,
        },
    ),
}  # fmt: skip


def route_arguments(op: str, router: str, dtype: torch.dtype) -> tuple:
    experts, top_k, biased, options = ROUTERS[router]
    rule = {"scoring": "softmax", "score_after_topk": False, "renormalize": False, "epsilon": 1e-20, "scale": 2.5}
    groups = {"num_groups": 1, "top_groups": 1, "group_score": "top2_sum", "losers_zero": False}
    rest = {"min_sum": 0.0, "soft_cap": 0.0, "round_scores": False}
    for table in (rule, groups, rest):
        table.update({name: value for name, value in options.items() if name in table})
    logits = torch.zeros((T, experts), dtype=dtype)
    if op == "topk_route_bwd":
        indices = torch.zeros((T, top_k), dtype=torch.int64)
        return torch.zeros(T, top_k), logits, indices, *rule.values(), *rest.values()
    bias = torch.zeros(experts) if biased else None
    values = *rule.values(), *groups.values(), *rest.values()
    return logits, bias, top_k, *values, options.get("weights_dtype")


class Variant(NamedTuple):
    dtype: torch.dtype
    block_m: int
    flags: frozenset[str] = frozenset()  # what differs from the plainest call, see arguments()

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([dtype, *([f"m{self.block_m}"] if self.block_m else []), *sorted(self.flags)])


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps outside its registers: spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def compile_launch(launch: _launch.Launch, arch: int) -> dict:
    """What ``JITFunction.run`` does up to and without the launch, for a target that need not be here."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    options = _launch.compile_options(launch)
    kwargs = {**launch.args, **launch.constexprs, **options, "debug": False, "instrumentation_mode": ""}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    start = time.perf_counter()
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return {
        "kernel": kernel.fn.__name__,
        "shared": compiled.metadata.shared,
        "cubin": len(compiled.asm["cubin"]),
        "warps": compiled.metadata.num_warps,
        "stack": stack_bytes(compiled.asm["cubin"]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def arguments(op: str, variant: Variant) -> tuple:
    """The backend function's arguments: right shapes and dtypes, any values."""
    if op.startswith("topk_route"):
        return route_arguments(op, *variant.flags, variant.dtype)
    uneven = 8 if "uneven" in variant.flags else 0
    d, i = D + uneven, I + uneven
    R, dtype, block_m = T * K, variant.dtype, variant.block_m

    def floats(*shape):
        return torch.zeros(shape, dtype=dtype)

    def weights(*shape):
        w = floats(*shape)
        return w.mT.contiguous().mT if "transposed" in variant.flags else w

    def ints(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    offsets, slots, positions, tiles = ints(E + 1), ints(R), ints(T, K), ints(2, R // max(block_m, 16) + E)
    plain = "plain" in variant.flags  # without a gate, with what is optional
    interleaved = "interleaved" in variant.flags  # gpt-oss: clamped, and transposed beside it
    activation, n = ("relu2", i) if plain else ("swiglu_oai" if interleaved else "swiglu", 2 * i)
    options = (1.702, 7.0, True) if interleaved else ()
    match op:
        case "routing_plan":
            return torch.zeros((T, K), dtype=torch.int64), E, 64
        case "permute":
            return floats(T, d), floats(T, K).float(), offsets, slots, positions
        case "unpermute":
            return floats(R, d), positions, floats(T, K).float()
        case "combine":
            return floats(T, d), floats(R, d), positions, floats(T, K).float(), floats(T, d)
        case "gate_up":
            bias = floats(E, n) if plain or interleaved else None
            plan = (offsets, slots, tiles, block_m, K)
            return floats(T, d), weights(E, n, d), bias, *plan, activation, True, True, *options
        case "grouped_gemm":
            bias = floats(E, d) if plain else None
            return floats(R, i), weights(E, d, i), bias, offsets, tiles, block_m, True
        case "d_activation":
            h = floats(R, n)
            plan = (offsets, slots, tiles, block_m)
            return h, floats(T, d), weights(E, d, i), h, floats(T, K).float(), *plan, activation, *options
        case "grouped_wgrad":
            gather = next((f for f in ("lhs", "rhs") if f in variant.flags), "none")
            sides = floats(T if gather == "lhs" else R, d), floats(T if gather == "rhs" else R, i)
            options = gather, plain, torch.float32 if plain else dtype
            return *sides, offsets, slots, K, *options, floats(E, d, i) if "accumulate" in variant.flags else None
    raise ValueError(op)


def variants(op: str, capability: tuple[int, int], every_row: bool) -> list[Variant]:
    bf16 = torch.bfloat16
    if op == "routing_plan":
        return [Variant(torch.int64, 0)]
    if op in ("permute", "unpermute", "combine"):
        return [Variant(dtype, 0) for dtype in (bf16, torch.float16, torch.float32)]
    if op.startswith("topk_route"):
        names = ROUTERS if every_row else ("deepseek-v3", "nemotron-3", "everything")
        return [Variant(dtype, 0, frozenset({name})) for name in names for dtype in (bf16, torch.float32)]
    if op == "grouped_wgrad":
        sides = [Variant(bf16, 0, frozenset({side})) for side in ("lhs", "rhs")]
        more = [
            Variant(bf16, 0, frozenset({"plain", "uneven"})),
            Variant(bf16, 0, frozenset({"rhs", "accumulate", "uneven"})),
            Variant(bf16, 0, frozenset({"lhs", "plain", "uneven"})),
            Variant(torch.float16, 0, frozenset({"lhs"})),
            *(Variant(torch.float32, 0, frozenset({side})) for side in ("lhs", "rhs")),
        ]
        return sides + more if every_row else sides
    gpt_oss = frozenset({"interleaved", "transposed"})
    in_turn = [Variant(bf16, 128, gpt_oss)] if op in ("gate_up", "d_activation") else []
    if not every_row:
        return [Variant(bf16, 128), Variant(torch.float32, 128), *in_turn]
    rows = [(size, block_m) for name, size, block_m in configs.table(capability) if name == op]
    flags = [{"transposed"}, {"uneven"}, {"plain"}]
    return [
        *(Variant(bf16 if size == 2 else torch.float32, block_m) for size, block_m in rows),
        *(Variant(bf16, 128, frozenset(flag)) for flag in flags),
        *in_turn,
        *([Variant(bf16 if size == 2 else torch.float32, m, gpt_oss) for size, m in rows] if op == "gate_up" else []),
        Variant(torch.float16, 64),
    ]


def launches_of(op: str, variant: Variant) -> tuple[list[_launch.Launch], list[tuple[str, int, int]]]:
    """What the op's backend function would launch, and the rows of the tile table it looked up."""
    recorded, rows = [], []

    def tiles(op, capability, element_size, block_m=0):
        rows.append((op, element_size, block_m))
        return configs.tiles(op, capability, element_size, block_m)

    for name in {op, "combine", "gate_up"}:  # unpermute launches through combine, d_activation through gate_up too
        module = importlib.import_module(f"moe_kernels.backends.triton.{name}")
        module.launch = lambda device, launch: recorded.append(launch)
        if hasattr(module, "tiles"):
            module.tiles = tiles
    function = getattr(importlib.import_module(f"moe_kernels.backends.triton.{op}"), op)
    function(*arguments(op, variant))
    return recorded, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", type=int, help="90 for sm_90")
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--every-row", action="store_true", help="every row of the tile table, not the tallest alone")
    chosen = parser.parse_args()
    assert not _launch.interpreted(), "unset TRITON_INTERPRET"

    _launch._WITHOUT_GPU = divmod(chosen.arch, 10)
    for op in chosen.ops:
        for variant in variants(op, _launch._WITHOUT_GPU, chosen.every_row):
            launches, rows = launches_of(op, variant)
            for launch in launches:
                compiled = compile_launch(launch, chosen.arch)
                print(json.dumps({"variant": f"{op}-{variant}", "rows": rows, **compiled}), flush=True)


if __name__ == "__main__":
    main()
