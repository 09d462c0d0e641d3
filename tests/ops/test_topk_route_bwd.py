"""What topk_route_bwd takes that topk_route never gives; gradients of its own choices: test_topk_route.py."""

import pytest
import torch

from moe_kernels.functional import topk_route
from tests.helpers import assert_close
from tests.ops.test_topk_route import TABLE, logits_of, naive_weights, split
from tests.tolerances import RELATIVE_L2

OP = "topk_route_bwd"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of inf and NaN in the interpreter


@TABLE
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
def test_a_slot_of_no_expert_has_no_gradient(target, how, experts, ids):
    """Whatever its index and its d_weight are, the others get what they would get without it."""
    T, K, rule = 12, how["top_k"], split(how)[1]
    logits = logits_of(T, experts, target)
    _, indices = topk_route(logits, **how)
    outside = torch.tensor([-1, experts, experts + 1, torch.iinfo(ids).min, torch.iinfo(ids).max])
    slots = torch.arange(T * K).view(T, K)
    gone = slots % 3 == 0
    gone[0], gone[1] = True, False
    d_weights = torch.randn(T, K, generator=torch.Generator().manual_seed(K)).masked_fill(gone, torch.inf)
    broken = torch.where(gone, outside[slots % len(outside)], indices.cpu()).to(ids)
    named = {"scoring": "softmax", "score_after_topk": False, "renormalize": False, "epsilon": 0.0, "scale": 1.0}
    named |= {"min_sum": 0.0, "soft_cap": 0.0} | rule
    d_logits = torch.ops.moe_kernels.topk_route_bwd(
        d_weights.to(target.device), logits, broken.to(target.device), *named.values()
    ).cpu()

    def gradient(dtype):
        z = logits.detach().cpu().to(dtype).requires_grad_()
        for t in range(1, T):  # the first has no expert at all
            kept = ~gone[t]
            if kept.any():
                weights = naive_weights(z[t : t + 1], indices[t : t + 1, kept].cpu(), **rule)
                weights.backward(d_weights[t : t + 1, kept].to(dtype))
        return z.grad

    assert not d_logits[0].any()
    if K == 1 and how.get("renormalize"):
        assert d_logits.abs().max() <= RELATIVE_L2[torch.float32] * d_weights[~gone].abs().max()
    else:
        assert_close(d_logits, gradient(torch.float64), gradient(target.dtype), "d_logits")
