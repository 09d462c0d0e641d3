import torch
from torch import Tensor, nn

from moe_kernels.backends.reference._common import activate
from moe_kernels.modules._arguments import positive
from moe_kernels.modules.experts import Experts
from moe_kernels.modules.topk_router import TopKRouter
from moe_kernels.ops._contract import check_activation, is_gated


class MoE(nn.Module):
    """A Mixture-of-Experts layer: router, experts, and optionally a shared expert that every token passes through.

    Args:
        hidden_size: D.
        intermediate_size: I of one expert.
        num_experts: E.
        top_k: K, experts per token.
        activation, alpha, limit: of the experts and the shared expert, see :class:`Experts`.
        shared_intermediate_size: width of the shared expert; None for no shared expert.
        recompute, accumulate_grad: see :class:`Experts`.
        device, dtype: of the parameters.
        router_options: those of :class:`TopKRouter`, ``scoring`` and so on.

    Shapes:
        x [..., D] -> [..., D] in the dtype of x

    Raises:
        ValueError: an argument that :class:`TopKRouter` or :class:`Experts` refuses, a ``shared_intermediate_size``
            that is no positive integer; in the forward, an x that is not [..., D].
        TypeError: an unknown router option; in the forward, an x that is no tensor or, outside autocast, of another
            dtype than the parameters.
        RuntimeError: in the forward and the backward, see :func:`functional.moe_experts`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        alpha: float | None = None,
        limit: float | None = None,
        shared_intermediate_size: int | None = None,
        recompute: str | None = None,
        accumulate_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        how = {"activation": activation, "alpha": alpha, "limit": limit}
        self.hidden_size = hidden_size
        self.router = TopKRouter(hidden_size, num_experts, top_k, **router_options, **where)
        memory = {"recompute": recompute, "accumulate_grad": accumulate_grad}
        self.experts = Experts(hidden_size, intermediate_size, num_experts, **memory, **how, **where)
        self.shared_expert = None
        if shared_intermediate_size is not None:
            positive("MoE", shared_intermediate_size=shared_intermediate_size)
            self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, **how, **where)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"MoE: x must be a tensor [..., {self.hidden_size}], got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"MoE: x must be [..., {self.hidden_size}], got {list(x.shape)}")
        x_TD = x.reshape(-1, self.hidden_size)
        weights_TK, indices_TK, _ = self.router(x_TD)
        out_TD = self.experts(x_TD, weights_TK, indices_TK)
        if self.shared_expert is not None:
            out_TD = out_TD + self.shared_expert(x_TD)
        return out_TD.to(x.dtype).view(x.shape)


class SharedExpert(nn.Module):
    """A plain MLP with the experts' activation: gate_up_proj [2S, D] or up_proj [S, D], and down_proj [D, S]."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        alpha: float | None = None,
        limit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation("SharedExpert", activation, alpha, limit)
        self.activation, self.alpha, self.limit = activation, alpha, limit
        gated = is_gated(activation)
        self._up_name = "gate_up_proj" if gated else "up_proj"
        options = {"bias": False, "device": device, "dtype": dtype}
        self.add_module(self._up_name, nn.Linear(hidden_size, intermediate_size * (2 if gated else 1), **options))
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, x_TD: Tensor) -> Tensor:
        h = getattr(self, self._up_name)(x_TD)
        return self.down_proj(activate(h, self.activation, self.alpha, self.limit))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
