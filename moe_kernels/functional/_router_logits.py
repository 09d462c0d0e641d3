"""Router logits [T, E] in fp32 from tokens and weight of any dtype, without an fp32 copy of either in the graph.

The products of half-precision numbers are exact in fp32, so a half-precision product that sums and returns in fp32 is
the fp32 product of the upcast operands; it takes a tensor core's time and saves the tokens, not a copy twice as large.
The backward needs the fp32 gradient of the logits: it is split into two bf16 numbers, 16 bits of mantissa together,
that stand side by side in one product twice as deep. E is small, so that costs little.
"""

import torch
from torch import Tensor

from moe_kernels.functional._autocast import without_autocast
from moe_kernels.functional.routing_plan import refuse_double_backward


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """[T, E] fp32, whatever autocast says: rounded logits choose other experts. Differentiable in both."""
    return _RouterLogits.apply(x_TD, weight_ED) if torch.is_grad_enabled() else _logits(x_TD, weight_ED)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return _logits(x_TD, weight_ED)

    @staticmethod
    def backward(ctx, d_TE):
        refuse_double_backward("router_logits")
        x_TD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dx_TD = dw_ED = None
        with without_autocast(x_TD.device.type):
            if not (x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16):  # fp16 lacks the range
                if needs_x:
                    dx_TD = _product(d_TE, weight_ED).to(x_TD.dtype)
                if needs_weight:
                    dw_ED = _product(d_TE.T, x_TD).to(weight_ED.dtype)
                return dx_TD, dw_ED
            high_TE = d_TE.bfloat16()
            parts_T2E = torch.cat([high_TE, (d_TE - high_TE).bfloat16()], dim=1)
            if needs_x:
                dx_TD = parts_T2E @ torch.cat([weight_ED, weight_ED])
            if needs_weight:
                dw_ED = _product(parts_T2E.T, x_TD).view(2, *weight_ED.shape).sum(0).to(weight_ED.dtype)
        return dx_TD, dw_ED


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    with without_autocast(x_TD.device.type):
        return _product(x_TD, weight_ED.T)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32."""
    if a.is_cuda and a.dtype == b.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
