import math

import torch
from torch import Tensor, nn

from moe_kernels.functional import RoutingPlan, moe_experts
from moe_kernels.functional._experts_contract import RECOMPUTE
from moe_kernels.modules._arguments import one_of, positive
from moe_kernels.ops._contract import check_activation, is_gated


class Experts(nn.Module):
    """``num_experts`` MLPs; every token goes through the ones its indices name, and their weighted outputs are summed.

    Args:
        hidden_size: D.
        intermediate_size: I of one expert.
        num_experts: E.
        activation: gated "swiglu", "geglu", "geglu_tanh", and the clamped "swiglu_oai", "swiglu_clamp_before",
            "swiglu_clamp_after"; non-gated "relu2", "gelu", "gelu_tanh", "silu".
        alpha, limit: the numbers of a clamped activation, see :func:`functional.moe_experts`.
        interleaved: gate and up rows in turn instead of gate rows first.
        transposed: keep the weights as [E, in, out]. gpt-oss does both.
        bias: add biases to both products.
        recompute: None, or "pre_activation" to save only the input and make the pre-activation again in the backward.
        accumulate_grad: add the gradients of the weights to a ``.grad`` that is there already in the products that make
            them, see :func:`functional.moe_experts`.
        device, dtype: of the parameters.

    Parameters (the layouts of Hugging Face Transformers v5):
        gate_up_proj [E, 2I, D], gate rows before up rows; non-gated: up_proj [E, I, D]
        down_proj [E, D, I]
        with ``transposed`` [E, D, 2I] or [E, D, I], and [E, I, D]
        gate_up_proj_bias [E, 2I] or up_proj_bias [E, I], down_proj_bias [E, D] with ``bias``

    Shapes:
        x_TD [T, D], routing_weights_TK [T, K], expert indices [T, K] or a plan of them -> [T, D]

    Raises:
        ValueError: a size that is no positive integer, an unknown activation or recompute, an ``alpha``, ``limit`` or
            ``interleaved`` that does not fit the activation.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        alpha: float | None = None,
        limit: float | None = None,
        interleaved: bool = False,
        transposed: bool = False,
        bias: bool = False,
        recompute: str | None = None,
        accumulate_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("Experts", hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts)
        check_activation("Experts", activation, alpha, limit, interleaved)
        one_of("Experts", "recompute", recompute, RECOMPUTE)
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.activation, self.alpha, self.limit, self.recompute = activation, alpha, limit, recompute
        self.accumulate_grad = accumulate_grad
        self.interleaved, self.transposed = interleaved, transposed
        gated = is_gated(activation)
        self._up_name = "gate_up_proj" if gated else "up_proj"
        shapes = {
            self._up_name: (num_experts, intermediate_size * (2 if gated else 1), hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
        }
        for name, (experts, rows, columns) in shapes.items():
            shape = (experts, columns, rows) if transposed else (experts, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            bias_parameter = nn.Parameter(torch.empty((experts, rows), device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"{name}_bias", bias_parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name in (self._up_name, "down_proj"):  # each expert as an nn.Linear of its own
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            bound = 1 / math.sqrt(weight.shape[1 if self.transposed else 2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, x_TD: Tensor, routing_weights_TK: Tensor, routing: Tensor | RoutingPlan) -> Tensor:
        """Run the experts.

        Args:
            x_TD: [T, D], of the dtype of the parameters; any float dtype under autocast.
            routing_weights_TK: [T, K], any float dtype.
            routing: expert indices int64 or int32 [T, K] (below 0 or >= E: no expert), or their
                ``functional.routing_plan``.

        Returns:
            [T, D] in the dtype of ``x_TD``.

        Raises:
            ValueError, TypeError, RuntimeError: see :func:`functional.moe_experts`.
        """
        up, down = getattr(self, self._up_name), self.down_proj
        if self.transposed:
            up, down = up.mT, down.mT
        return moe_experts(
            x_TD,
            routing_weights_TK,
            routing,
            up,
            down,
            activation=self.activation,
            alpha=self.alpha,
            limit=self.limit,
            interleaved=self.interleaved,
            bias_gate_up_E2I=getattr(self, f"{self._up_name}_bias"),
            bias_down_ED=self.down_proj_bias,
            recompute=self.recompute,
            accumulate_grad=self.accumulate_grad,
        )

    def extra_repr(self) -> str:
        text = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
        text += f"num_experts={self.num_experts}, activation={self.activation}, bias={self.down_proj_bias is not None}"
        for name in ("alpha", "limit", "interleaved", "transposed", "recompute", "accumulate_grad"):
            if getattr(self, name) not in (None, False):
                text += f", {name}={getattr(self, name)}"
        return text
