"""A training step of a whole model: Qwen3-30B-A3B cut to 4 layers, 4 x 4096 tokens, bf16, sdpa attention.

More than half of its time is not the experts' (attention, head, loss), so this says what a user gains; with Liger's
dense kernels on, as whoever cares about speed has them, and without. A step is forward + loss + backward. ``.grad`` is
None when it starts, as after ``zero_grad()``, so the gradients appear while the activations go; the peak is all that is
allocated, parameters included. Stock with Liger is known to peak at 17.76 GiB (195.2 ms), which leaves no room for the
5.8 GiB of gradients to be there from the start. ``step_adamw_ms`` adds fused AdamW.

The first step is measured in a process with empty compiler caches, with what compiles again when the batch changes.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.bench.layer import Inaccurate, relative_l2
from moe_kernels.bench.measure import median_ms
from moe_kernels.bench.peers import available, empty_caches, say, watch

FILE = "model.json"
GIB = 2**30
LIGER = "liger+"
EXPERTS = ("grouped_mm", "moe_kernels")
#: The losses of two implementations differ by less than bf16 rounds one number.
MOST_LOSS_DIFFERENCE = 2**-9
#: Relative L2 between the gradients of two bf16 implementations, which round each some 1e-3 away from the truth.
MOST_GRADIENT_DIFFERENCE = 3e-2
_LIMIT_S = 240
_REPEATS, _ADAMW_REPEATS = 8, 5

#: One batch for each tile size that a plan may have (128, 64, 32, 16): what these compile is warm-up.
WARM = ((1, 2000), (1, 1000), (1, 500), (1, 200))
#: Batch sizes and lengths of 20 batches as training and short batches have them, all tile sizes in turn: other lengths,
#: an incomplete batch, odd token counts, multiples of 16, a single token.
CHANGING = (
    *((4, 4095), (1, 300), (4, 4080), (1, 17), (4, 4001), (1, 1023), (4, 3333), (1, 512), (4, 2048), (1, 1)),
    *((3, 4001), (1, 256), (3, 1777), (1, 999), (1, 4096), (1, 128), (1, 3001), (1, 777), (1, 1500), (1, 16)),
)


class Sizes(NamedTuple):
    name: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    batch: int
    length: int


SIZES = {
    sizes.name: sizes
    for sizes in (
        Sizes("qwen3-30b-4L", 4, 2048, 768, 128, 8, 32, 4, 128, 151936, 4, 4096),
        Sizes("tiny", 2, 64, 32, 8, 2, 4, 2, 16, 128, 2, 24),  # to try the harness itself
    )
}


def build(sizes: Sizes, device: str) -> nn.Module:
    """The model in bf16 with random weights, for training."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=3 * sizes.hidden,  # of dense layers, of which there are none
        moe_intermediate_size=sizes.intermediate,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):  # billions of random numbers: seconds on a GPU
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()


def use_liger(model: nn.Module) -> None:
    """Liger's RMSNorm, rotary embedding and fused linear cross-entropy; its experts stay out."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    apply_liger_kernel_to_qwen3_moe(
        rope=True, rms_norm=True, fused_linear_cross_entropy=True, cross_entropy=False, swiglu=False, model=model
    )


def random_ids(sizes: Sizes, device: str, batch: int | None = None, length: int | None = None) -> Tensor:
    return torch.randint(sizes.vocab, (batch or sizes.batch, length or sizes.length), device=device)


def step(model: nn.Module, ids: Tensor) -> Tensor:
    """Forward, loss, backward; the loss."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


# The steps


def measure_steps(sizes: Sizes, with_liger: bool, device: str = "cuda") -> dict[str, dict]:
    """The rows of one model: stock experts and ours, first with stock's dense kernels, then with Liger's."""
    from moe_kernels import enable

    enable()
    model, ids = build(sizes, device), random_ids(sizes, device)
    rows: dict[str, dict] = {}
    for dense in ("", LIGER) if with_liger else ("",):
        if dense:
            use_liger(model)
        expected: list[Tensor] | None = None
        chosen: list[Tensor] = []
        for experts in EXPERTS:
            model.set_experts_implementation(experts)
            name = f"model/{sizes.name}/{dense}{experts}"
            with same_choice(model, chosen):
                loss, gradients = checked_step(model, ids)
            check_loss(name, loss, next(iter(rows.values()), {"loss": loss})["loss"])
            if expected is None:
                expected = gradients
            check_gradients(name, gradients, expected)
            rows[name] = {"loss": loss} | measure(model, ids)
    return rows


@contextlib.contextmanager
def same_choice(model: nn.Module, chosen: list[Tensor]) -> Iterator[None]:
    """Keep the experts that each router chooses in ``chosen``, or make it choose those that are there.

    A rounding decides between experts whose scores are alike. The first layer's gradients would differ by some percent
    between two right implementations just because tokens went elsewhere in later layers.
    """
    record, layers = not chosen, model.model.layers

    def choose(place: int, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, indices = output
        if record:
            chosen.append(indices)
            return output
        weights = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen[place])
        return logits, (weights / weights.sum(-1, keepdim=True)).to(scores.dtype), chosen[place]

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, output, place=place: choose(place, output))
        for place, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def checked_step(model: nn.Module, ids: Tensor) -> tuple[float, list[Tensor]]:
    """The loss, and the gradients of the first layer's experts, which all other layers have passed on.

    They are kept in the host's memory: on the GPU they would count in the peaks.
    """
    model.zero_grad()
    loss = step(model, ids).item()
    experts = model.model.layers[0].mlp.experts
    return loss, [parameter.grad.cpu() for parameter in (experts.gate_up_proj, experts.down_proj)]


def check_loss(name: str, loss: float, expected: float) -> None:
    if not abs(loss - expected) < MOST_LOSS_DIFFERENCE * expected:
        raise Inaccurate(f"{name}: the loss is {loss:.5f}, stock's on the same weights {expected:.5f}")


def check_gradients(name: str, gradients: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """The loss alone says little of the experts: with random weights it hardly depends on them."""
    for which, gradient, stock in zip(("gate_up_proj", "down_proj"), gradients, expected, strict=True):
        error = relative_l2(gradient, stock.float())
        if not error < MOST_GRADIENT_DIFFERENCE:  # NaN too
            allowed = f"allowed {MOST_GRADIENT_DIFFERENCE:.0e}"
            raise Inaccurate(f"{name}: the gradient of {which} differs from stock's by {error:.1e}, {allowed}")


def measure(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Time and peak of a step of this model, without an optimizer and with AdamW."""
    clear = model.zero_grad
    step_ms, peak_gib = _timed(lambda: step(model, ids), clear, _REPEATS)
    # A learning rate of 0 costs the same and leaves the next row the same weights.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def adamw_step() -> None:
        step(model, ids)
        optimizer.step()

    step_adamw_ms, peak_adamw_gib = _timed(adamw_step, clear, _ADAMW_REPEATS)
    clear()
    return {
        "step_ms": step_ms,
        "tokens_per_s": ids.numel() / step_ms * 1e3,
        "peak_gib": peak_gib,
        "step_adamw_ms": step_adamw_ms,
        "peak_adamw_gib": peak_adamw_gib,
    }


def _timed(run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Milliseconds, and GiB at the peak of one more run."""
    ms = median_ms(run, repeats, prepare)
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    return ms, torch.cuda.max_memory_allocated() / GIB


# The first step


class Compilations:
    """Names of the Triton kernels compiled since the last :meth:`taken`, ours and others'."""

    def __init__(self):
        self.names: list[str] = []

    def watch(self) -> None:
        import triton

        # Called when a kernel has no binary in memory yet; with an empty disk cache it is then compiled.
        triton.knobs.runtime.jit_cache_hook = self._seen

    def _seen(self, *args, fn, **kwargs) -> None:
        self.names.append(f"{fn.module}.{fn.name}")

    def taken(self) -> tuple[list[str], list[str]]:
        """(ours, others'), and start again."""
        names, self.names = self.names, []
        ours = [name for name in names if name.partition(".")[0] == "moe_kernels"]
        return ours, [name for name in names if name not in ours]


def measure_first_step(sizes: Sizes, started: float) -> dict[str, dict]:
    """The row of a fresh process, with Liger's dense kernels: its imports, its first step, what other batches compile.

    Args:
        started: ``time.time()`` when the process was.
    """
    import liger_kernel.transformers  # noqa: F401
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from moe_kernels import enable

    enable()
    compilations = Compilations()
    compilations.watch()
    imported = time.time()
    model, ids = build(sizes, "cuda"), random_ids(sizes, "cuda")
    use_liger(model)
    torch.cuda.synchronize()
    built = time.time()
    step(model, ids)
    torch.cuda.synchronize()
    row: dict[str, float | str] = {
        "import_s": imported - started,
        "build_s": built - imported,
        "first_step_s": time.time() - built,
    }
    row |= _counted("first", compilations)
    for batches, label in ((WARM, "warm"), (CHANGING, "after")):
        _other_batches(model, sizes, batches)
        row |= _counted(label, compilations)
    return {f"model/{sizes.name}/first_step": row}


def _other_batches(model: nn.Module, sizes: Sizes, batches: Iterable[tuple[int, int]]) -> None:
    for batch, length in batches:
        model.zero_grad()
        step(model, random_ids(sizes, "cuda", batch, length))
    torch.cuda.synchronize()


def _counted(label: str, compilations: Compilations) -> dict[str, float | str]:
    ours, others = compilations.taken()
    counts = {f"compilations_{label}": len(ours), f"compilations_{label}_others": len(others)}
    return counts | ({f"compiled_{label}": " ".join(sorted(set(ours)))} if ours else {})


# Processes of their own: Liger's patches are for good, and a first step needs caches that nobody filled


def measured(what: str, sizes: Sizes = SIZES["qwen3-30b-4L"]) -> dict[str, dict]:
    """The rows of ``what`` ("steps" or "first-step"), or {"reason": why there are none}."""
    command = [sys.executable, "-m", "moe_kernels.bench.model", "--what", what, "--model", sizes.name]
    with empty_caches() if what == "first-step" else contextlib.nullcontext(os.environ) as environment:
        return watch([*command, f"--started={time.time()}"], {what: _LIMIT_S}, what, environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("steps", "first-step"), required=True)
    parser.add_argument("--model", choices=SIZES, default="qwen3-30b-4L", help="default: qwen3-30b-4L")
    parser.add_argument("--started", type=float, default=None, metavar="S", help="time.time() of the process's start")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("moe_kernels.bench.model: needs a CUDA GPU")
    sizes = SIZES[args.model]
    if args.what == "steps":
        say(measure_steps(sizes, available()["liger"] is None))
    else:
        say(measure_first_step(sizes, args.started or time.time()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
