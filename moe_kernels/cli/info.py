"""``moe-kernels info``: what runs here, op by op, and why the other backends were passed over."""

import argparse
import json

from moe_kernels.bench import machine
from moe_kernels.cli import UsageError, require

# Widths of a common expert (Qwen3-30B-A3B); only their alignment matters to the choice.
_WIDTHS = (2048, 768)
_ACCELERATED = ("cuda", "triton")


def run(args: argparse.Namespace) -> int:
    if not args.json:
        require("info", "rich")
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 0 if facts["accelerated"] else 1


def problem(op: str, device, dtype):
    """What ``op`` asks a backend for on this device."""
    from moe_kernels import backends

    # The routing plan is integers only: it is asked for without a dtype, as the op itself asks.
    return backends.Problem(device, None, ()) if op == "routing_plan" else backends.Problem(device, dtype, _WIDTHS)


def collect() -> dict:
    import torch

    from moe_kernels import backends

    gpu = machine.gpu()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    try:
        forced = backends.forced_backend()
    except ValueError as error:
        raise UsageError(error) from None
    ops = []
    for op in backends.OPS:
        try:
            choice = backends.resolve(op, problem(op, device, dtype))
            backend, passed_over = choice.backend, dict(choice.passed_over)
        except RuntimeError as error:  # a forced backend that can't run
            backend, passed_over = None, {str(forced): str(error)}
        ops.append({"op": op, "backend": backend, "passed_over": passed_over})
    return {
        "versions": machine.versions(),
        "gpu": gpu,
        "extension": machine.extension(),
        "forced_backend": forced,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "ops": ops,
        "accelerated": any(row["backend"] in _ACCELERATED for row in ops),
    }


def show(facts: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    about = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    for name, version in facts["versions"].items():
        about.add_row(name, version or "not installed")
    about.add_row("GPU", _gpu_line(facts["gpu"]))
    about.add_row("CUDA extension", _extension_line(facts["extension"]))
    if facts["forced_backend"]:
        about.add_row("forced backend", facts["forced_backend"])

    ops = Table(title=f"Backend of each op on {facts['device']} in {facts['dtype']}", title_justify="left")
    ops.add_column("op", no_wrap=True)
    ops.add_column("backend", no_wrap=True)
    ops.add_column("passed over", overflow="fold")
    for row in facts["ops"]:
        style = "green" if row["backend"] in _ACCELERATED else "yellow" if row["backend"] else "red"
        reasons = "\n".join(f"{backend}: {reason}" for backend, reason in row["passed_over"].items())
        ops.add_row(row["op"], Text(row["backend"] or "none", style=style), Text(reasons, style="dim"))

    console = Console()
    console.print(about, "", ops, sep="\n")
    if note := _note(facts):
        console.print(note, highlight=False)


def _note(facts: dict) -> str:
    """What layers inside Hugging Face models do where kernels don't run."""
    if any(row["backend"] is None for row in facts["ops"]):
        return f"The forced backend {facts['forced_backend']} can't run here: layers inside Hugging Face models raise."
    if facts["accelerated"]:
        return ""
    if facts["device"] == "cpu":
        return (
            "No op has a kernel on this machine; on a CPU, layers inside Hugging Face models run on the plain-torch "
            "reference."
        )
    if facts["forced_backend"] == "reference":
        return "The reference is forced: layers inside Hugging Face models run on plain torch."
    return "Nothing is accelerated here: layers inside Hugging Face models run Transformers' own code."


def _gpu_line(gpu: dict | None) -> str:
    if gpu is None:
        return "none that torch can use"
    memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
    driver = f"driver {gpu['driver'] or 'unknown'}"
    return (
        f"{gpu['name']} · compute capability {gpu['capability']} · {memory} · {driver} · torch CUDA {gpu['torch_cuda']}"
    )


def _extension_line(extension: dict) -> str:
    if "reason" in extension:
        return extension["reason"]
    driver = extension["driver_supports_cuda"]
    supports = f"driver supports CUDA {driver}" if driver else "no driver"
    return f"built for {extension['architectures']} with CUDA {extension['cuda_version']} · {supports}"
