import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.functional import topk_route
from moe_kernels.functional._router_logits import router_logits
from moe_kernels.modules._arguments import finite, not_negative, one_of, positive
from moe_kernels.ops._contract import FLOATS
from moe_kernels.ops.topk_route import GROUP_SCORES, SCORINGS

#: What the repr shows where it isn't the default.
_REPR = {
    "score_after_topk": False,
    "epsilon": 0.0,
    "min_sum": 0.0,
    "scale": 1.0,
    "soft_cap": 0.0,
    "num_groups": 1,
    "top_groups": 1,
    "group_score": "top2_sum",
    "losers_zero": False,
    "weights_dtype": None,
}


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
        renormalize: divide the K weights by their sum + ``epsilon``, but by no less than ``min_sum``.
        score_after_topk: choose on the logits, then score only the chosen (gpt-oss, Granite).
        epsilon: added to the sum when renormalising.
        min_sum: least divisor when renormalising (Ernie 4.5); 0 for none.
        scale: multiplies the weights.
        soft_cap: first replace the logits by soft_cap * tanh(logits / soft_cap) (Laguna); 0 for no cap. The logits that
            are returned are those without.
        selection_bias: keep a buffer ``selection_bias`` [E], zero at first, that is added to the scores for choosing
            only. It gets no gradient: a load-balancing rule updates it. It stays fp32 when the module is cast.
        num_groups, top_groups: keep only the experts of the ``top_groups`` best groups.
        group_score: what makes a group good: "top2_sum", its two best scores (DeepSeek-V3), or "max", its best one
            (DeepSeek-V2).
        losers_zero: the experts of the other groups take part with a score of 0, where they are left out by default.
        weights_dtype: of the weights; None for fp32. Softmax routers of Transformers give that of the model (Qwen3).
        device, dtype: of the parameter.

    Shapes:
        x_TD [T, D] -> (routing_weights_TK [T, K] ``weights_dtype``, expert_indices_TK [T, K] int64,
        logits_TE [T, E] fp32, or fp64 where x or the parameter is)

    Raises:
        ValueError: an argument that is none of those above or out of range, a ``top_k`` of more experts than there are
            or than the kept groups have; named in the message.
        RuntimeError: a double backward, a forced backend that can't run.
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
        min_sum: float = 0.0,
        scale: float = 1.0,
        soft_cap: float = 0.0,
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: str = "top2_sum",
        losers_zero: bool = False,
        weights_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = num_groups, top_groups, group_score
        _check(hidden_size, num_experts, top_k, scoring, groups, weights_dtype)
        not_negative("TopKRouter", epsilon=epsilon, min_sum=min_sum, soft_cap=soft_cap)
        finite("TopKRouter", scale=scale)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scoring, self.renormalize, self.score_after_topk = scoring, renormalize, score_after_topk
        self.epsilon, self.min_sum, self.scale, self.soft_cap = map(float, (epsilon, min_sum, scale, soft_cap))
        self.num_groups, self.top_groups, self.group_score = groups
        self.losers_zero, self.weights_dtype = losers_zero, weights_dtype
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
            group_score=self.group_score,
            losers_zero=self.losers_zero,
            min_sum=self.min_sum,
            soft_cap=self.soft_cap,
            weights_dtype=self.weights_dtype,
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
        if self.selection_bias is not None:
            parts.append("selection_bias=True")
        for name, default in _REPR.items():
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
        return ", ".join(parts)


def _check(hidden_size, num_experts, top_k, scoring, groups, weights_dtype) -> None:
    name, (num_groups, top_groups, group_score) = "TopKRouter", groups
    sizes = {"hidden_size": hidden_size, "num_experts": num_experts, "top_k": top_k}
    positive(name, **sizes, num_groups=num_groups, top_groups=top_groups)
    one_of(name, "scoring", scoring, SCORINGS)
    one_of(name, "group_score", group_score, GROUP_SCORES)
    one_of(name, "weights_dtype", weights_dtype, (None, *FLOATS))
    if top_k > num_experts:
        raise ValueError(f"{name}: top_k must be at most num_experts = {num_experts}, got {top_k}")
    least, words = (2, "two or more") if group_score == "top2_sum" and num_groups > 1 else (1, "one or more")
    if num_experts % num_groups or num_experts // num_groups < least:
        raise ValueError(
            f"{name}: num_groups must divide num_experts = {num_experts} into groups of {words}, got {num_groups}"
        )
    if top_groups > num_groups:
        raise ValueError(f"{name}: top_groups must be at most num_groups = {num_groups}, got {top_groups}")
    reachable = num_experts // num_groups * top_groups
    if top_k > reachable:
        raise ValueError(f"{name}: top_k must be at most the {reachable} experts of the kept groups, got {top_k}")
