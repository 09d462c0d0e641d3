"""Write the README's figures from the committed results: ``python -m benchmarks.readme``.

Everything between the two markers is made here; ``tests/test_readme.py`` fails when it is not what the results say.
"""

import json
from pathlib import Path

from moe_kernels.bench.results import ROOT

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
BEGIN, END = "<!-- measured: written by python -m benchmarks.readme -->", "<!-- /measured -->"


def measured() -> str:
    block = json.loads((RESULTS / "moe_block.json").read_text())
    convergence = json.loads((RESULTS / "convergence.json").read_text())
    return "\n\n".join([_machine(block), _block(block), _convergence(convergence)])


def _machine(results: dict) -> str:
    gpu, versions = results["machine"]["gpu"], results["machine"]["versions"]
    return (
        f"One {gpu['name']}, driver {gpu['driver']}, torch {versions['torch']} (CUDA {gpu['torch_cuda']}), Triton "
        f"{versions['triton']}, Transformers {versions['transformers']}; content hash of the kernels "
        f"`{results['machine']['content_hash']}`. In the same run a copy moves {results['copy_tb_per_s']:.2f} TB/s and "
        f"an 8192³ product makes {results['matmul_tflops']:.0f} TFLOP/s."
    )


def _block(results: dict) -> str:
    lines = [
        "The whole MoE block of Qwen3 (stock router, our or stock experts), bf16, uniform random routing. Stock is "
        "Transformers' default, `grouped_mm`. *Held* is what stays between forward and backward, *peak* the most a "
        "step takes beyond parameters, gradients, input and output.",
        "",
        "| layer | T · D · I · E · K | | fwd ms | fwd+bwd ms | TFLOP/s | held MiB | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results["shapes"].items():
        sizes = " · ".join(str(result["shape"][letter]) for letter in "TDIEK")
        stock, ours = (result["rows"][f"block, {label}"] for label in ("grouped_mm", "moe_kernels"))
        lines.append(f"| {name} | {sizes} | stock | {_figures(stock)} |")
        lines.append(f"| | | **moe_kernels** | {_figures(ours)} |")
        speedup, lean = stock["step_ms"] / ours["step_ms"], stock["held_mib"] / ours["held_mib"]
        lines.append(f"| | | | | **{speedup:.1f}x** | | **{lean:.1f}x less** | |")
    return "\n".join(lines)


def _figures(row: dict) -> str:
    times = f"{row['forward_ms']:.2f} | {row['step_ms']:.2f} | {row['step_tflops']:.0f}"
    return f"{times} | {row['held_mib']:.0f} | {row['peak_mib']:.0f}"


def _convergence(results: dict) -> str:
    ours, stock = results["runs"]["moe_kernels"], results["runs"]["stock"]
    difference = results["comparison"]["last_loss_difference_percent"]
    layers, steps = results["sizes"]["layers"], len(ours["losses"])
    picture = (RESULTS / "convergence.png").relative_to(ROOT).as_posix()
    return (
        f"A {layers}-layer Qwen3-30B-shaped checkpoint, {steps} steps in bf16 through "
        "`moe-kernels finetune --compare`, the same weights and data: the mean loss of the last 20 steps is "
        f"{ours['loss_last']:.4f} with our experts and {stock['loss_last']:.4f} with stock ({difference:+.2f} %), at "
        f"{ours['tokens_per_second']:,.0f} and {stock['tokens_per_second']:,.0f} tokens/s, optimizer included.\n\n"
        f"![loss of both runs]({picture})"
    )


def written(readme: str) -> str:
    """The README with its figures renewed."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{measured()}\n{END}{rest.split(END)[1]}"


def main(path: Path = README) -> None:
    path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main()
