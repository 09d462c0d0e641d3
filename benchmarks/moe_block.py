"""The MoE block of Qwen3 on our experts and on Transformers' own: error, then time and memory.

    python -m benchmarks.moe_block --shape qwen3-30b --shape olmoe-7b

Each case is checked first: output and gradients of the experts against float32, with less than twice the error of
stock bf16. A case that fails prints no time. Writes ``benchmarks/results/<gpu>/moe_block.json``.
"""

import argparse
import json
import sys

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from moe_kernels import enable, use_backend
from moe_kernels.bench.machine import machine
from moe_kernels.bench.measure import Measured, bound_ms, copy_rate, matmul_rate, measure
from moe_kernels.bench.results import results_dir
from moe_kernels.bench.shapes import SHAPES, Shape, routing
from moe_kernels.functional import moe_experts, routing_plan

STOCK = "grouped_mm"


def relative_l2(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def build_block(shape: Shape, implementation: str):
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.D,
        moe_intermediate_size=shape.I,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    with torch.device("cuda"):
        block = Qwen3MoeSparseMoeBlock(config).bfloat16()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return block


def errors(shape: Shape, block) -> dict[str, dict[str, float]]:
    """Relative L2 error of output and gradients, ours and stock, bf16 against float32 of the same numbers."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    weights, indices = routing("uniform", shape, "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(shape.T, shape.D, device="cuda", generator=generator).bfloat16()
    d_out = torch.randn(shape.T, shape.D, device="cuda", generator=generator).bfloat16()
    names = ("out", "dx", "d_weights", "dw_gate_up", "dw_down")
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj

    def ours(dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weights, gate_up, down)]
        out = moe_experts(inputs[0], inputs[1], routing_plan(indices, shape.E), *inputs[2:])
        return (out, *torch.autograd.grad(out, inputs, d_out.to(dtype)))

    def stock():
        inputs = [t.detach().requires_grad_() for t in (x, weights)]
        out = grouped_mm_experts_forward(block.experts, inputs[0], indices, inputs[1])
        return (out, *torch.autograd.grad(out, [*inputs, gate_up, down], d_out))

    with use_backend("reference"):
        truth = [t.detach() for t in ours(torch.float32)]
    measured = {}
    for label, run in (("moe_kernels", lambda: ours(torch.bfloat16)), (STOCK, stock)):
        measured[label] = {name: relative_l2(v, t) for name, v, t in zip(names, run(), truth, strict=True)}
    return measured


def run_shape(shape: Shape, bytes_per_second: float) -> dict:
    result: dict = {"shape": shape._asdict(), "rows": {}}
    block = build_block(shape, STOCK)
    result["errors"] = errors(shape, block)
    bad = [n for n, e in result["errors"]["moe_kernels"].items() if not e < 2 * result["errors"][STOCK][n] + 1e-6]
    if bad:
        result["failed"] = f"error of {', '.join(bad)} is not below twice stock's"
        return result

    weights, indices = routing("uniform", shape, "cuda")
    bound = bound_ms(shape, torch.bincount(indices.flatten(), minlength=shape.E), bytes_per_second)
    result["bound_ms"] = bound
    x = torch.randn(shape.T, shape.D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    d_out = torch.randn_like(x)
    for implementation in (STOCK, "moe_kernels"):
        block.experts.config._experts_implementation = implementation
        measured = measure(
            lambda: block(x.view(1, shape.T, shape.D)).view(shape.T, shape.D), d_out, [x, *block.parameters()]
        )
        result["rows"][f"block, {implementation}"] = row(shape, measured, None)
    weights = weights.requires_grad_()
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    for recompute in (None, "pre_activation"):
        measured = measure(
            lambda recompute=recompute: moe_experts(
                x, weights, routing_plan(indices, shape.E), gate_up, down, recompute=recompute
            ),
            d_out,
            [x, weights, gate_up, down],
        )
        label = "experts, moe_kernels" + (f", recompute={recompute}" if recompute else "")
        result["rows"][label] = row(shape, measured, bound)
    return result


def row(shape: Shape, measured: Measured, bound: dict | None) -> dict:
    out = {name: round(value, 4) for name, value in measured._asdict().items()}
    out["forward_tflops"] = round(shape.forward_flops / measured.forward_ms / 1e9, 1)
    out["step_tflops"] = round(3 * shape.forward_flops / measured.step_ms / 1e9, 1)
    if bound:
        out["forward_over_bound"] = round(measured.forward_ms / bound["forward"], 3)
        out["step_over_bound"] = round(measured.step_ms / bound["step"], 3)
    return out


def show(results: dict, console: Console) -> None:
    table = Table(title=f"MoE block on one {results['machine']['gpu']['name']}, bf16, uniform routing")
    for heading in ("shape", "what", "fwd ms", "bwd ms", "fwd+bwd ms", "TFLOP/s", "x bound", "held MiB", "peak MiB"):
        table.add_column(heading, justify="left" if heading in ("shape", "what") else "right")
    for name, result in results["shapes"].items():
        if "failed" in result:
            table.add_row(name, f"[red]{result['failed']}[/red]")
        for what, r in result["rows"].items():
            times = (f"{r[key]:.2f}" for key in ("forward_ms", "backward_ms", "step_ms"))
            over = f"{r['step_over_bound']:.2f}" if "step_over_bound" in r else ""
            memory = (f"{r[key]:.0f}" for key in ("held_mib", "peak_mib"))
            table.add_row(name, what, *times, f"{r['step_tflops']:.0f}", over, *memory)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be given more than once")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.moe_block: needs a CUDA GPU")
    enable()
    torch.backends.cuda.matmul.allow_tf32 = False
    bytes_per_second = copy_rate()
    results = {
        "machine": machine(),
        "copy_tb_per_s": round(bytes_per_second / 1e12, 3),
        "matmul_tflops": round(matmul_rate() / 1e12, 1),
        "shapes": {},
    }
    console = Console(width=None if sys.stdout.isatty() else 120)  # a log should not fold the table
    for name in track(args.shape or ["qwen3-30b"], description="shapes", console=console):
        results["shapes"][name] = run_shape(SHAPES[name], bytes_per_second)
        torch.cuda.empty_cache()
    show(results, console)
    if not args.no_save:
        path = results_dir() / "moe_block.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"written to {path}")
    return any("failed" in result for result in results["shapes"].values())


if __name__ == "__main__":
    sys.exit(main())
