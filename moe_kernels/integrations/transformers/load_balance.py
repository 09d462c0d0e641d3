"""Balanced experts in training: every router with a selection bias found, its load counted, its bias moved.

DeepSeek-V3, GLM, Nemotron, MiniMax-M2 and others keep a bias that is added to the scores for choosing experts, and
Transformers never changes it. :class:`LoadBalanceCallback` does, in a Trainer; :class:`LoadBalancer` in any other loop.
The rule: ``moe_kernels/functional/load_balance.py``.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.utils import logging

from moe_kernels.functional import ExpertLoad, expert_load, routing_plan, update_selection_bias_
from moe_kernels.functional.load_balance import check_rate, sum_over_group
from moe_kernels.integrations.transformers.experts import hand_on

logger = logging.get_logger(__name__)

#: What families call the bias: most; afmoe and lfm2_moe; our own TopKRouter.
BIASES = ("e_score_correction_bias", "expert_bias", "selection_bias")
_ROUTERS = ("gate", "router")


@dataclass(eq=False)
class _Layer:
    name: str  # of the MoE block
    router: nn.Module
    holder: nn.Module  # of the bias: the router, its block or a part of the router
    attribute: str
    counts_E: Tensor = field(init=False)

    def __post_init__(self):
        bias = self.bias
        self.counts_E = torch.zeros(bias.numel(), dtype=torch.int64, device=bias.device)

    @property
    def bias(self) -> Tensor:
        # Looked up anew: FSDP2 and model.to() put another tensor in its place.
        return getattr(self.holder, self.attribute)

    @torch.no_grad()
    def read(self) -> Tensor:
        """fp32 [E]; a sharded bias is gathered."""
        bias = self.bias.detach()
        return (bias.full_tensor() if isinstance(bias, DTensor) else bias).reshape(-1).float()

    @torch.no_grad()
    def write(self, value_E: Tensor) -> None:
        bias = self.bias.detach()
        value = value_E.view(bias.shape)
        if isinstance(bias, DTensor):  # every rank holds the whole value: cut, don't send
            value = distribute_tensor(value, bias.device_mesh, bias.placements, src_data_rank=None)
        bias.copy_(value)


class _Stack:
    """Layers of one device and one number of experts, updated together."""

    def __init__(self, layers: list[_Layer]):
        self.layers = layers
        # A bias in fp32 is its own master: what others write into it counts.
        exact = all(layer.bias.dtype == torch.float32 and not isinstance(layer.bias, DTensor) for layer in layers)
        self.master_LE = None if exact else self._read()

    def step(self, rate: float, group) -> ExpertLoad:
        counts_LE = torch.stack([layer.counts_E for layer in self.layers])
        torch._foreach_zero_([layer.counts_E for layer in self.layers])
        if group is not None:
            counts_LE = sum_over_group(counts_LE, group)
        if rate:
            values_LE = self._read() if self.master_LE is None else self.master_LE
            update_selection_bias_(values_LE, counts_LE, rate=rate)
            for layer, value_E in zip(self.layers, values_LE):
                layer.write(value_E)
        return expert_load(counts_LE)

    def _read(self) -> Tensor:
        return torch.stack([layer.read() for layer in self.layers])


class LoadBalancer:
    """Counts where a model's routers send tokens in training and moves their selection biases.

    Counted is every forward of a router in training mode, over as many micro-batches as come before :meth:`step`.
    The recomputation of gradient checkpointing is not counted again, evaluation not at all. Nothing waits for the GPU.
    A bias that is not in fp32 (MiniMax-M2's is loaded in the checkpoint's dtype) gets an fp32 master here, and is its
    rounding after every step: steps of 1e-3 vanish in bf16.

    Args:
        model: any model with routers that have a selection bias, whatever their class.
        group: the process group whose loads are added up; by default the default group, where there is one. Ranks that
            see the same tokens (tensor or expert parallelism) change nothing; ranks with other layers (pipeline
            parallelism) must not be in one group.

    Raises:
        ValueError: the model has no such router.
    """

    def __init__(self, model: nn.Module, *, group: "dist.ProcessGroup | None" = None) -> None:
        found = _find(model)
        if not found:
            raise ValueError(
                f"LoadBalancer: model must have a router with a selection bias ({', '.join(BIASES)}), "
                f"{type(model).__name__} has none"
            )
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group = group
        alike: dict[tuple, list[_Layer]] = {}
        for layer in found:
            alike.setdefault((layer.counts_E.device, layer.counts_E.numel()), []).append(layer)
        self._stacks = [_Stack(layers) for layers in alike.values()]
        layers = [layer for stack in self._stacks for layer in stack.layers]
        #: Names of the MoE blocks, in the order of :meth:`step`'s values.
        self.layers = tuple(layer.name for layer in layers)
        # Before other hooks: those of expert parallelism put local ids into the router's output.
        self._hooks = [
            layer.router.register_forward_hook(functools.partial(_count, layer), prepend=True) for layer in layers
        ]

    def step(self, rate: float = 1e-3) -> ExpertLoad:
        """Move the biases by ``rate`` (0: don't) and start counting anew; call it after each optimizer step.

        Returns:
            The load since the last call, over the group: tensors [layers] on the device.
        """
        check_rate("LoadBalancer.step", rate)
        loads = [stack.step(rate, self.group) for stack in self._stacks]
        device = loads[0].entropy.device
        return ExpertLoad(*(torch.cat([value.to(device) for value in values]) for values in zip(*loads)))

    def remove(self) -> None:
        """Take the hooks off the model; the biases stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class LoadBalanceCallback(TrainerCallback):
    """Keeps experts evenly loaded without an auxiliary loss: ``Trainer(..., callbacks=[LoadBalanceCallback()])``.

    After every optimizer step each selection bias moves by ``rate`` against its expert's load (:class:`LoadBalancer`
    says what is counted). To the Trainer's logs of the loss it adds, per MoE block, the mean over the steps since the
    last one:

        expert_load/<block>/max_over_mean   1 is even
        expert_load/<block>/entropy         1 is even

    and both without ``<block>/`` as the mean of all blocks. At the end of training it draws max / mean over the steps
    into ``expert_load.png`` in the output folder, if matplotlib is installed.

    The biases are part of the model and saved with it; a resumed run goes on from them. One that is stored in bf16
    resumes from its rounding. PEFT saves adapters only: save such a model's biases yourself, or set ``rate`` to 0.

    Args:
        rate: size of a step, or a function of the global step that gives it; 0 only measures. DeepSeek-V3 used 1e-3 and
            0 for the last 3 % of its tokens.
        group: as for :class:`LoadBalancer`.
        log_layers: log every block; otherwise only the mean of all.
        chart: the chart's file name, None for no chart.

    Raises:
        ValueError: an argument out of range; when training begins, a model without a router that has a selection bias.
    """

    def __init__(
        self,
        rate: float | Callable[[int], float] = 1e-3,
        *,
        group: "dist.ProcessGroup | None" = None,
        log_layers: bool = True,
        chart: str | None = "expert_load.png",
    ) -> None:
        if not callable(rate):
            check_rate("LoadBalanceCallback", rate)
        self.rate, self.group, self.log_layers, self.chart = rate, group, log_layers, chart
        self.balancer: LoadBalancer | None = None
        #: Global step -> max / mean of every block, in the order of ``balancer.layers``; complete when training ends.
        self.history: dict[int, list[float]] = {}
        self._pending: list[tuple[int, Tensor]] = []

    def attach(self, trainer) -> "LoadBalanceCallback":
        """Add the callback before the Trainer's others, so that TensorBoard and the like get its values too.

        Passed as ``callbacks=[...]`` it comes after them: its values then reach the log history and the console.
        """
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.balancer is not None:  # of a run that was interrupted
            self.balancer.remove()
        self.history, self._pending = {}, []
        self.balancer = LoadBalancer(model, group=self.group)

    def on_optimizer_step(self, args, state, control, **kwargs):
        # Here and not in on_step_end: the step's number is still its own, and nobody has evaluated or saved yet.
        rate = self.rate(state.global_step) if callable(self.rate) else self.rate
        load = self.balancer.step(rate)
        self._pending.append((state.global_step + 1, torch.stack([load.max_over_mean, load.entropy])))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not self._pending:
            return
        values = self._values()
        logs.update(values)
        if state.log_history:  # the Trainer has already put a copy of the logs there
            state.log_history[-1].update(values)

    def on_train_end(self, args, state, control, **kwargs):
        if self._pending:
            self._values()
        self.balancer.remove()
        if self.chart and self.history and state.is_world_process_zero:
            _draw(Path(args.output_dir) / self.chart, self.history, self.balancer.layers)

    def _values(self) -> dict[str, float]:
        """What to log of the pending steps. The one place that waits for the GPU."""
        steps_S2L = torch.stack([values for _, values in self._pending]).cpu()
        self.history |= {step: values[0].tolist() for (step, _), values in zip(self._pending, steps_S2L)}
        self._pending = []
        found = {}
        for metric, means in zip(("max_over_mean", "entropy"), steps_S2L.double().mean(0).tolist()):
            found[f"expert_load/{metric}"] = statistics.fmean(means)
            if self.log_layers:
                found |= {f"expert_load/{name}/{metric}": mean for name, mean in zip(self.balancer.layers, means)}
        return found


def _find(model: nn.Module) -> list[_Layer]:
    modules = dict(model.named_modules())
    layers = []
    for name, holder in modules.items():
        attribute = next((a for a in BIASES if isinstance(getattr(holder, a, None), Tensor)), None)
        own = attribute and (attribute in holder._buffers or attribute in holder._parameters)
        if not own or "original_module" in name:  # PEFT's modules_to_save trains a copy beside the original
            continue
        block = _block(name, modules)
        router = holder if block is None else _router(modules[block])
        layers.append(_Layer(name if block is None else block, router, holder, attribute))
    return layers


def _block(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The module that holds the experts: ``name`` itself or the nearest one around it."""
    while True:
        if isinstance(getattr(modules[name], "experts", None), nn.Module):
            return name
        if not name:
            return None
        name = name.rpartition(".")[0]


def _router(block: nn.Module) -> nn.Module:
    for name in _ROUTERS:
        if isinstance(getattr(block, name, None), nn.Module):
            return getattr(block, name)
    raise ValueError(f"LoadBalancer: {type(block).__name__} has a selection bias but no {' or '.join(_ROUTERS)}")


def _count(layer: _Layer, router: nn.Module, args: tuple, output: object) -> None:
    """Forward hook of a router."""
    if not router.training:
        return
    # Gradient checkpointing, reentrant or not, computes the forward again inside of the backward. Compiled code is
    # traced outside of both, and its recomputation changes no counts.
    if not torch.compiler.is_compiling() and (
        torch._C._current_graph_task_id() != -1 or torch.is_inference_mode_enabled()
    ):
        return
    output = output if isinstance(output, (tuple, list)) else (output,)
    indices = [t for t in output if isinstance(t, Tensor) and t.dtype in (torch.int64, torch.int32)]
    if len(indices) != 1:
        raise TypeError(
            f"LoadBalancer: {layer.name}: the output of {type(router).__name__} must hold the expert indices as its "
            f"one integer tensor, got {len(indices)} of them"
        )
    with torch.no_grad():
        indices_TK = indices[0].to(layer.counts_E.device).flatten(0, -2)
        plan = routing_plan(indices_TK, layer.counts_E.shape[0])
        layer.counts_E.add_(plan.tokens_per_expert_E)
    if indices[0].device == layer.counts_E.device:  # where the experts are
        hand_on(plan, indices[0])


def _draw(path: Path, history: dict[int, list[float]], layers: tuple[str, ...]) -> None:
    """One thin line per MoE block, from the first (light) to the last (dark), and their mean."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(f"{path.name} is not drawn: it needs matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    steps = list(history)
    colors = colormaps["YlGn"]
    for index, name in enumerate(layers):
        color = colors(0.3 + 0.65 * index / max(1, len(layers) - 1))
        label = name if len(layers) <= 8 else None
        axis.plot(steps, [values[index] for values in history.values()], color=color, linewidth=1, label=label)
    means = [statistics.fmean(values) for values in history.values()]
    axis.plot(steps, means, color="#222222", linewidth=1.8, label=f"mean of {len(layers)} blocks")
    axis.axhline(1, color="#555555", linewidth=0.8, linestyle="--")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_title("Load of the fullest expert over the mean load (1 = even)", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9)
    axis.grid(color="#d9d9d9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
