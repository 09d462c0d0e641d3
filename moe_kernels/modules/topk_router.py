import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.functional import topk_route
from moe_kernels.functional._router_logits import router_logits
from moe_kernels.modules._arguments import one_of, positive
from moe_kernels.ops.topk_route import SCORINGS


class TopKRouter(nn.Module):
    """Choose ``top_k`` of ``num_experts`` experts per token.

    The product is summed and returned in fp32 whatever the parameter dtype or autocast: rounding the logits changes
    which experts are chosen. Half-precision operands cost nothing: 8 or 11 bits times as many fit in fp32's 24, so each
    product is exact there and a tensor core gives what upcast operands would.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K, experts per token.
        scoring: "softmax" over the experts, "sigmoid" or "sqrtsoftplus".
        renormalize: divide the K weights by their sum + ``epsilon``.
        score_after_topk: choose on the logits, then score only the chosen.
        epsilon: added to the sum when renormalising.
        scale: multiplies the weights.
        selection_bias: keep a buffer ``selection_bias`` [E], zero at first, that is added to the scores for choosing
            only. It gets no gradient: a load-balancing rule updates it. It stays fp32 when the module is cast.
        num_groups, top_groups: keep only the experts of the ``top_groups`` best groups.
        device, dtype: of the parameter.

    Shapes:
        x_TD [T, D] -> (routing_weights_TK [T, K] fp32, expert_indices_TK [T, K] int64, logits_TE [T, E] fp32)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = True,
        score_after_topk: bool = False,
        epsilon: float = 0.0,
        scale: float = 1.0,
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(hidden_size, num_experts, top_k, scoring, num_groups, top_groups)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scoring, self.renormalize, self.score_after_topk = scoring, renormalize, score_after_topk
        self.epsilon, self.scale = float(epsilon), float(scale)
        self.num_groups, self.top_groups = num_groups, top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        bias_E = torch.zeros(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", bias_E)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if torch.float64 in (x_TD.dtype, self.weight.dtype):  # autocast leaves it alone
            logits_TE = F.linear(x_TD.double(), self.weight.double())
        else:
            logits_TE = router_logits(x_TD, self.weight)
        weights_TK, indices_TK = topk_route(
            logits_TE,
            self.top_k,
            scoring=self.scoring,
            score_after_topk=self.score_after_topk,
            renormalize=self.renormalize,
            epsilon=self.epsilon,
            scale=self.scale,
            selection_bias_E=self.selection_bias,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
        )
        return weights_TK, indices_TK, logits_TE

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) must not round the selection bias: its updates are smaller than a bf16 step.
        before = self.selection_bias
        super()._apply(fn, recurse)
        after = self.selection_bias
        if after is not None and after.dtype != before.dtype and after.dtype.itemsize < before.dtype.itemsize:
            self.selection_bias = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        parts = [f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"]
        parts.append(f"scoring={self.scoring}, renormalize={self.renormalize}")
        if self.score_after_topk:
            parts.append("score_after_topk=True")
        if self.epsilon:
            parts.append(f"epsilon={self.epsilon:g}")
        if self.scale != 1:
            parts.append(f"scale={self.scale:g}")
        if self.selection_bias is not None:
            parts.append("selection_bias=True")
        if self.num_groups > 1:
            parts.append(f"num_groups={self.num_groups}, top_groups={self.top_groups}")
        return ", ".join(parts)


def _check(hidden_size, num_experts, top_k, scoring, num_groups, top_groups) -> None:
    name = "TopKRouter"
    positive(
        name,
        hidden_size=hidden_size,
        num_experts=num_experts,
        top_k=top_k,
        num_groups=num_groups,
        top_groups=top_groups,
    )
    one_of(name, "scoring", scoring, SCORINGS)
    if top_k > num_experts:
        raise ValueError(f"{name}: top_k must be at most num_experts = {num_experts}, got {top_k}")
    if num_experts % num_groups or (num_groups > 1 and num_experts // num_groups < 2):
        raise ValueError(
            f"{name}: num_groups must divide num_experts = {num_experts} into groups of two or more, got {num_groups}"
        )
    if top_groups > num_groups:
        raise ValueError(f"{name}: top_groups must be at most num_groups = {num_groups}, got {top_groups}")
    reachable = num_experts // num_groups * top_groups
    if top_k > reachable:
        raise ValueError(f"{name}: top_k must be at most the {reachable} experts of the kept groups, got {top_k}")
