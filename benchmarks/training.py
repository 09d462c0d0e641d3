"""Do the families train like stock? Tiny models in fp32 on the CPU: families.json of results/cpu.

    python -m benchmarks.training

Every seed family takes 20 steps of SGD on our experts, routers and blocks, and from the same weights, on the same
tokens, 20 on stock's. Kept are the largest relative L2 differences: of a gradient in the first step and in the last,
and of a step's loss. The models are those of the tests; where a family has two (Nemotron-3 with and without latent
projections), the larger figure counts.

What rounding alone does is in the rows ``training/<family>/eager``: stock's eager experts beside stock's default.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import moe_kernels
from moe_kernels.bench import results
from moe_kernels.bench.layer import YARDSTICK
from moe_kernels.bench.machine import machine
from moe_kernels.bench.results import ROOT
from moe_kernels.bench.session import rounded
from tests.helpers import relative_l2
from tests.integrations.models import loss_and_gradients, make_model

FILE = "families.json"
DIRECTORY = ROOT / "benchmarks" / "results" / "cpu"
#: Name of a seed family -> its models among those of the tests.
FAMILIES = {
    "deepseek-v3": ("deepseek_v3",),
    "glm-5": ("glm_moe_dsa",),
    "minimax-m2.5": ("minimax_m2",),
    "qwen3.5": ("qwen3_5_moe",),
    "nemotron-3": ("nemotron_h", "nemotron_h_latent"),
}
OURS, EAGER = "moe_kernels", "eager"
STEPS = 20
#: At 0.05 the small Qwen3.5 with its linear attention is chaotic: rounding grows tenfold a step, stock's own included.
LEARNING_RATE = 0.02
_BATCH, _LENGTH, _VOCABULARY = 2, 24, 128


class Run(NamedTuple):
    losses: list[Tensor]
    first: dict[str, Tensor]  # gradients by parameter
    last: dict[str, Tensor]


def batches(steps: int) -> Iterator[Tensor]:
    """Tokens that follow a rule, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        start = torch.randint(3, _VOCABULARY, (_BATCH, 1), generator=generator)
        yield 3 + (start - 3 + 7 * torch.arange(_LENGTH)) % (_VOCABULARY - 3)


def train(name: str, implementation: str, steps: int = STEPS) -> Run:
    torch.manual_seed(0)  # some vectors are initialised at random
    model = make_model(name, experts_implementation=YARDSTICK if implementation == OURS else implementation)
    if implementation == OURS:
        _accelerate(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses, gradients = [], []
    for ids in batches(steps):
        loss, found = loss_and_gradients(model, ids)
        losses.append(loss)
        gradients = [*gradients[:1], found]
        optimizer.step()
    return Run(losses, gradients[0], gradients[-1])


def _accelerate(model: nn.Module) -> None:
    """All of it: a part that stays stock equals stock, which would show nothing."""
    found = moe_kernels.report(moe_kernels.patch(model))
    for row in (*found.layers, *found.routers, *found.blocks):
        if not row.accelerated:
            raise RuntimeError(f"{type(model).__name__}: {row.name} runs on stock: {row.reason}")


def compare(run: Run, stock: Run) -> dict[str, float]:
    return {
        "first_gradients": max(relative_l2(run.first[name], true) for name, true in stock.first.items()),
        "losses": max(map(relative_l2, run.losses, stock.losses)),
        "last_gradients": max(relative_l2(run.last[name], true) for name, true in stock.last.items()),
    }


def rows(family: str, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Ours and stock's eager experts, each beside stock's default, by row name."""
    found = {OURS: [], EAGER: []}
    for name in FAMILIES[family]:
        stock = train(name, YARDSTICK, steps)
        for implementation, compared in found.items():
            figures = compare(train(name, implementation, steps), stock)
            fallen = stock.losses[-1] / stock.losses[0]
            compared.append(figures | {"last_over_first_loss": fallen.item()})
    return {
        f"training/{family}/{implementation}": {
            metric: rounded(max(figures[metric] for figures in compared)) for metric in compared[0]
        }
        for implementation, compared in found.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--results-dir", type=Path, default=DIRECTORY, help="default: benchmarks/results/cpu")
    args = parser.parse_args(arguments)
    for family in FAMILIES:
        found = rows(family)
        results.save(args.results_dir / FILE, found, machine())
        for name, row in found.items():
            print(name, ", ".join(f"{metric} {figure:.2g}" for metric, figure in row.items()), flush=True)


if __name__ == "__main__":
    main()
