"""One MoE layer to measure: the block of Qwen3 on any implementation of its experts, and the check before any time.

The block has the stock router, so all implementations run on the same selection; its experts can also be called alone,
with a routing that is given. Errors are relative L2 against fp32 arithmetic on the same bf16 numbers.

One implementation brings our router (``FUSED_ROUTER``). Logits in bf16 tie: in one token of sixteen the eighth and
the ninth of 128 are the same number, and of those stock takes any, ours the lowest index. So what it computes is held
against the truth for its own choice, which must have stock's logits at every rank; the error allowed is that of the
yardstick on stock's choice.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from moe_kernels import patch, use_backend
from moe_kernels.bench import peers
from moe_kernels.bench.shapes import Shape, routing
from moe_kernels.functional import moe_experts, routing_plan

#: Transformers' own implementations; the yardstick is its default.
STOCK = ("eager", "grouped_mm", "batched_mm")
YARDSTICK = "grouped_mm"
#: Ours with our router too, as ``patch(model)`` leaves a block.
FUSED_ROUTER = "moe_kernels_fused_router"
#: Ours adding weight gradients to ``.grad`` itself.
ACCUMULATE = "moe_kernels_accumulate"
#: Ours, with the options of ``patch`` and the forced backend of each.
OURS = {
    "moe_kernels": ({}, None),
    "moe_kernels_recompute": ({"recompute": "pre_activation"}, None),
    "moe_kernels_triton": ({}, "triton"),
    ACCUMULATE: ({"accumulate_grad": True}, None),
    FUSED_ROUTER: ({}, None),
}
#: Ours may be this many times less exact than the yardstick. Stock and peers only have to be sane.
TIMES_YARDSTICK, SLACK, SANE = 2, 1e-6, 0.1

#: What is compared, in the order of ``gradients``.
NAMES = {
    "block": ("out", "dx", "d_router", "dw_gate_up", "dw_down"),
    "experts": ("out", "dx", "d_weights", "dw_gate_up", "dw_down"),
}


class Inaccurate(Exception):
    """The result is wrong, so its time means nothing."""


def gradients(forward: Callable[[], Tensor], leaves: Sequence[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output and the gradient of each leaf."""
    out = forward()
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def accumulated(forward: Callable[[], Tensor], leaves: Sequence[Tensor], d_out: Tensor) -> list[Tensor]:
    """The same, by way of ``.grad``: half of what two steps leave there, which in binary numbers is that of one."""
    for leaf in leaves:
        leaf.grad = None
    for _ in range(2):
        out = forward()
        out.backward(d_out)
    found = [out.detach(), *(leaf.grad / 2 for leaf in leaves)]
    for leaf in leaves:
        leaf.grad = None
    return found


def relative_l2(value: Tensor, truth: Tensor) -> float:
    return (_norm(value.float() - truth) / _norm(truth)).item()


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def backend_of(implementation: str) -> AbstractContextManager[None]:
    """To run an implementation inside: forces a backend where its name asks for one."""
    return use_backend(OURS.get(implementation, ({}, None))[1])


def forward_block(block: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    """The call of a Transformers block, for a batch of one."""
    return block(x_TD.unsqueeze(0)).view(x_TD.shape)


class Layer:
    """A block with random weights (std 0.02), unit-scale input and output gradient, bf16."""

    def __init__(self, shape: Shape, device: str = "cuda"):
        self.shape, self.device = shape, device
        self.block = build_block(shape, device)
        self.x = torch.randn(shape.T, shape.D, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.d_out = torch.randn_like(self.x)
        self.routed = functools.cache(self._route)
        self._truth = functools.lru_cache(maxsize=1)(self._true_gradients)  # it is larger than the layer
        self._yardstick = functools.cache(self._yardstick_errors)

    def _route(self, kind: str) -> tuple[Tensor, Tensor]:
        weights, indices = routing(kind, self.shape, self.device)
        return weights.requires_grad_(), indices

    def rows_per_expert(self, kind: str) -> Tensor:
        return torch.bincount(self.routed(kind)[1].flatten(), minlength=self.shape.E)

    def module(self, what: str, implementation: str) -> Callable[..., Tensor]:
        """The block or its experts, on the same parameters, with one implementation of the experts."""
        if implementation not in (*STOCK, *OURS):
            return peers.peer_block(implementation, self.shape, self.block)
        experts, router = copy.copy(self.block.experts), copy.copy(self.block.gate)
        experts.config = copy.copy(experts.config)
        block = copy.copy(self.block)
        block._modules = self.block._modules | {"experts": experts, "gate": router}
        if implementation in OURS:
            patch(block if implementation == FUSED_ROUTER else experts, **OURS[implementation][0])
        else:
            experts.config._experts_implementation = implementation
        return experts if what == "experts" else block

    def forward(self, what: str, kind: str, implementation: str) -> Callable[[], Tensor]:
        """What a row of results times; to be called inside ``backend_of(implementation)``."""
        module = self.module(what, implementation)
        if what == "block":
            return lambda: forward_block(module, self.x)
        weights, indices = self.routed(kind)
        return lambda: module(self.x, indices, weights)

    def leaves(self, what: str, kind: str) -> tuple[Tensor, ...]:
        """What gets a gradient, in the order of ``NAMES``."""
        routing_leaf = self.block.gate.weight if what == "block" else self.routed(kind)[0]
        return self.x, routing_leaf, self.block.experts.gate_up_proj, self.block.experts.down_proj

    # The check

    def errors(self, what: str, kind: str, implementation: str) -> dict[str, float]:
        """Relative errors of the output and of every gradient; :class:`Inaccurate` if one is too large."""
        found = accumulated if implementation == ACCUMULATE else gradients
        with backend_of(implementation):
            values = found(self.forward(what, kind, implementation), self.leaves(what, kind), self.d_out)
        label = f"{what}/{self.shape.name}/{kind}/{implementation}"
        limit = None if implementation in OURS else SANE
        return self.check(label, what, kind, values, limit, fused_router=implementation == FUSED_ROUTER)

    def check(
        self,
        label: str,
        what: str,
        kind: str,
        values: Sequence[Tensor],
        limit: float | None = None,
        fused_router: bool = False,
    ) -> dict[str, float]:
        """The errors of ``values``, in the order of ``NAMES`` or the first of them; refused above ``limit``.

        By default that is what the yardstick's error allows.
        """
        yardstick = self._yardstick(what, kind)  # before the truth, which it may put out of the cache
        truth = self._truth(what, kind, fused_router)
        errors = {}
        for name, value, true in zip(NAMES[what], values, truth, strict=False):
            errors[name] = relative_l2(value, true)
            allowed = limit or TIMES_YARDSTICK * yardstick[name] + SLACK
            if not errors[name] < allowed:  # NaN too
                raise Inaccurate(f"{label}: relative error of {name} is {errors[name]:.2e}, allowed {allowed:.2e}")
        return errors

    def _true_gradients(self, what: str, kind: str, fused_router: bool) -> list[Tensor]:
        exact = [leaf.detach().float().requires_grad_() for leaf in self.leaves(what, kind)]
        indices = self._chosen(fused_router) if what == "block" else self.routed(kind)[1]

        def forward() -> Tensor:
            x, routing_leaf, gate_up, down = exact
            weights = _weights_of(x, routing_leaf, indices) if what == "block" else routing_leaf
            return moe_experts(x, weights, routing_plan(indices, self.shape.E), gate_up, down)

        with use_backend("reference"):
            return gradients(forward, exact, self.d_out.float())

    def _yardstick_errors(self, what: str, kind: str) -> dict[str, float]:
        truth = self._truth(what, kind, False)
        values = None
        with contextlib.suppress(RuntimeError):
            values = gradients(self.forward(what, kind, YARDSTICK), self.leaves(what, kind), self.d_out)
        if values is None:  # stock lacks the memory or a kernel: plain torch, an expert at a time
            with use_backend("reference"):
                values = gradients(self.forward(what, kind, "moe_kernels"), self.leaves(what, kind), self.d_out)
        return {name: relative_l2(v, t) for name, v, t in zip(NAMES[what], values, truth, strict=True)}

    @torch.no_grad()
    def _chosen(self, fused_router: bool) -> Tensor:
        """The experts of the stock router, or of ours, which may differ between equal logits only."""
        logits, _, indices = self.block.gate(self.x)
        if not fused_router:
            return indices
        router = self.module("block", FUSED_ROUTER).gate
        if type(router) is type(self.block.gate):
            raise Inaccurate(f"{FUSED_ROUTER}: there is no rule for the router of this release of Transformers")
        ours = router(self.x)[2]
        if not torch.equal(logits.gather(1, ours), logits.gather(1, indices)):
            raise Inaccurate(f"{FUSED_ROUTER}: it chooses experts with other logits than stock's")
        return ours


def _weights_of(x_TD: Tensor, router_ED: Tensor, indices_TK: Tensor) -> Tensor:
    """The routing weights of Qwen3 for a selection that is given: in fp32 its router would choose other experts."""
    chosen = (x_TD @ router_ED.T).softmax(-1).gather(-1, indices_TK)
    return chosen / chosen.sum(-1, keepdim=True)


def build_block(shape: Shape, device: str) -> nn.Module:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.D,
        moe_intermediate_size=shape.I,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        norm_topk_prob=True,
    )
    config._experts_implementation = YARDSTICK
    torch.manual_seed(0)
    with torch.device(device):
        block = Qwen3MoeSparseMoeBlock(config).bfloat16()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
    return block
