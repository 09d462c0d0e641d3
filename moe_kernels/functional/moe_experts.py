"""The experts of a MoE layer, forward and backward, with the least memory that needs no recomputation.

Forward                                             Backward, given dO
    H = gather(X) . W_gate_up^T   (saved)               dA' = gather(dO) . W_down   -> dS, A' = s A, dH over H
    A = act(H)                    (freed)               dW_down = gather(dO)^T . A'          then A' is freed
    Y = A . W_down^T              (freed)               dX = sum over k of dH . W_gate_up
    O = sum over k of s Y                               dW_gate_up = dH^T . gather(X)

Two autograd Functions, so that dW_down is accumulated and freed before dW_gate_up exists. Between forward and backward
live X, H, the plan and the routing weights. With ``accumulate_grad`` both are added to a ``.grad`` that is there, and
none is made beside it. Source of the algorithm: SonicMoE (arXiv 2512.14080); in-place dH, the
order and the column chunks of large Y and dX are ours. Shape letters: T K R E D I, and N = 2I (gated) or I.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moe_kernels import backends
from moe_kernels.functional import _accumulate_grad, _down_bias
from moe_kernels.functional._autocast import cast, products_dtype
from moe_kernels.functional._experts_contract import check, check_residual
from moe_kernels.functional._row_product import row_product_and_sum
from moe_kernels.functional.grouped_gemm import row_sums
from moe_kernels.functional.routing_plan import MIN_BLOCK_M, RoutingPlan, refuse_double_backward, routing_plan
from moe_kernels.ops import decode_experts


class _How(NamedTuple):
    activation: str
    options: tuple[float | None, float | None, bool]  # of the activation: alpha, limit, interleaved
    store_h: bool  # False: nobody needs H, or the backward makes it again
    recompute: bool
    accumulate_grad: bool
    dtype: torch.dtype  # of the products; a parameter of another dtype is cast here and gets its gradient in its own


def moe_experts(
    x_TD: Tensor,
    routing_weights_TK: Tensor,
    routing: RoutingPlan | Tensor,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    *,
    activation: str = "swiglu",
    bias_gate_up_E2I: Tensor | None = None,
    bias_down_ED: Tensor | None = None,
    residual_TD: Tensor | None = None,
    recompute: str | None = None,
    accumulate_grad: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Run every token through its experts and sum their weighted outputs.

    Args:
        x_TD: tokens [T, D].
        routing_weights_TK: [T, K], any float dtype; multiplies the expert outputs (after the down bias).
        routing: expert indices [T, K] (below 0 or >= E: no expert), or their :func:`routing_plan`, which a caller makes
            once where several layers share it. Given indices, few tokens that need no gradient take one op that makes
            no plan (``ops/decode_experts.py``).
        w_gate_up_E2ID: [E, 2I, D], gate rows before up rows; [E, I, D] for a non-gated activation.
        w_down_EDI: [E, D, I]. Weights stored the other way round, as gpt-oss does, are passed as ``w.mT``: they are
            read as they lie, and their gradients are made in their layout.
        activation: gated "swiglu", "geglu", "geglu_tanh" and the clamped "swiglu_oai", "swiglu_clamp_before",
            "swiglu_clamp_after" (``ops/_contract.py`` says what they are); non-gated "relu2", "gelu", "gelu_tanh",
            "silu".
        bias_gate_up_E2I, bias_down_ED: optional.
        residual_TD: [T, D], added to the sum over the experts before it is rounded: a shared expert's output.
        recompute: None saves the pre-activation H [R, 2I]; "pre_activation" saves only x and makes H again in the
            backward, +22 % FLOPs. It also allows more than one backward over the graph, which otherwise raises: dH is
            written over H.
        accumulate_grad: add the gradients of the weights to a ``.grad`` that is there already (fp32, or of the dtype
            of the products) in the products that make them, so gradient accumulation needs no memory of the weights'
            size. Autograd itself gets the gradient, and a warning says why, where it has to: tensor hooks of a weight,
            ``torch.autograd.grad``, DistributedDataParallel, a weight that is no parameter or its ``.mT``, a ``.grad``
            that the kernels can't add to. Under torch.compile those that show in the backward alone raise instead.
        alpha: of "swiglu_oai" (gpt-oss: 1.702).
        limit: of the clamped activations (gpt-oss: 7).
        interleaved: gate and up rows of ``w_gate_up_E2ID``, and so the elements of its bias, come in turn.

    Returns:
        [T, D] in the dtype of ``x_TD``. Under autocast the products run in the autocast dtype and fp32 parameters get
        fp32 gradients. Differentiable in x, the routing weights, both weights and both biases; frozen ones are
        skipped. No host sync; bitwise reproducible.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, an unknown activation or recompute, an
            ``alpha`` or ``limit`` that the activation needs and does not get, or gets and does not have.
        RuntimeError: a second backward over a consumed graph, a double backward, a forced backend that can't run, a
            compiled graph with ``accumulate_grad`` in a backward that must not accumulate.
    """
    tensors = (x_TD, routing_weights_TK, w_gate_up_E2ID, w_down_EDI, bias_gate_up_E2I, bias_down_ED)
    options = alpha, limit, interleaved
    check(*tensors, routing, activation, options, recompute)
    if residual_TD is not None:
        check_residual(residual_TD, x_TD)
    differentiable = *tensors, residual_TD
    needs_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    if not isinstance(routing, RoutingPlan):
        if not needs_backward:
            weights = w_gate_up_E2ID, bias_gate_up_E2I, w_down_EDI, bias_down_ED
            decode = x_TD, routing, routing_weights_TK, *weights, activation, *options
            if _decodes(*decode):
                out_TD = torch.ops.moe_kernels.decode_experts(*decode)
                return out_TD if residual_TD is None else out_TD + cast(residual_TD, out_TD.dtype)
        routing = routing_plan(routing, w_gate_up_E2ID.shape[0])
    how = _How(
        activation,
        options,
        store_h=needs_backward and recompute is None,
        recompute=recompute is not None,
        accumulate_grad=needs_backward and accumulate_grad and _accumulate_grad.allowed_here(),
        dtype=products_dtype(x_TD, x_TD.device.type),
    )
    x, residual = cast(x_TD, how.dtype), cast(residual_TD, how.dtype)
    if not needs_backward:
        _, a_RI = _gate_up(x, w_gate_up_E2ID, bias_gate_up_E2I, routing, how, store_h=False, store_a=True)
        inner = w_gate_up_E2ID.shape[1]
        out_TD = _down(a_RI, w_down_EDI, bias_down_ED, routing_weights_TK, routing, inner, how, residual)
        return cast(out_TD, x_TD.dtype)
    if torch.compiler.is_compiling():
        leaves = w_gate_up_E2ID, bias_gate_up_E2I, routing_weights_TK, w_down_EDI, bias_down_ED
        adds = [how.accumulate_grad and _accumulate_grad.in_graph(w, x) for w in (w_gate_up_E2ID, w_down_EDI)]
        return cast(_Compiled.apply(x, *leaves, routing, how, residual, tuple(adds)), x_TD.dtype)
    h_RN, a_RI = _GateUp.apply(x, w_gate_up_E2ID, bias_gate_up_E2I, routing, how)
    again = (x, w_gate_up_E2ID, bias_gate_up_E2I) if how.recompute else (None, None, None)
    out_TD = _Down.apply(h_RN, a_RI, routing_weights_TK, w_down_EDI, bias_down_ED, again, routing, how, residual)
    return cast(out_TD, x_TD.dtype)


class _GateUp(torch.autograd.Function):
    """X -> (H, A). A carries no gradient: ``_Down`` returns the gradient of H."""

    @staticmethod
    def forward(ctx, x_TD, w_E2ID, bias_E2I, plan, how):
        h_RN, a_RI = _gate_up(x_TD, w_E2ID, bias_E2I, plan, how, store_h=how.store_h, store_a=True)
        if not how.store_h:  # H exists for autograd's graph alone: right shape, one element of memory
            h_RN = x_TD.new_empty(1, 1).expand(plan.slots_R.shape[0], w_E2ID.shape[1])
        ctx.save_for_backward(x_TD, w_E2ID, *plan[:4])
        ctx.block_m, ctx.how = plan.block_m, how
        ctx.mark_non_differentiable(a_RI)
        ctx.set_materialize_grads(False)
        return h_RN, a_RI

    @staticmethod
    def backward(ctx, dh_RN, _):
        x_TD, w_E2ID, *tensors = ctx.saved_tensors
        plan = RoutingPlan(*tensors, ctx.block_m)
        node = ctx.next_functions[1][0] if ctx.how.accumulate_grad else None
        return *_d_gate_up(dh_RN, x_TD, w_E2ID, plan, ctx.how, *ctx.needs_input_grad[:3], node=node), None, None


class _Down(torch.autograd.Function):
    """(H, A, S) -> O. Saves H and recomputes A from it; its backward returns dH in H's own memory."""

    @staticmethod
    def forward(ctx, h_RN, a_RI, weights_TK, w_EDI, bias_ED, again, plan, how, residual_TD):
        out_TD = _down(a_RI, w_EDI, bias_ED, weights_TK, plan, h_RN.shape[1], how, residual_TD)
        ctx.save_for_backward(h_RN, weights_TK, w_EDI, bias_ED, *plan[:4], *again)
        ctx.block_m, ctx.how, ctx.consumed = plan.block_m, how, None
        return out_TD

    @staticmethod
    def backward(ctx, d_out_TD):
        h_RN, weights_TK, w_EDI, bias_ED, plan, again = _saved(ctx)
        how, d_out_TD = ctx.how, d_out_TD.contiguous()
        needs_h, _, needs_weights, needs_w, needs_bias, *_, needs_residual = ctx.needs_input_grad
        dh_RN = dw_EDI = d_weights_TK = d_bias_ED = None
        if needs_h or needs_weights or needs_w:
            if how.recompute:
                h_RN, _ = _gate_up(*again, plan, how, store_h=True, store_a=False)
            a_scaled_RI, d_weights_TK = _d_activation(ctx, d_out_TD, w_EDI, h_RN, weights_TK, plan)
            dh_RN = h_RN
        if needs_w:
            node = ctx.next_functions[3][0] if how.accumulate_grad else None
            dw_EDI, _ = _wgrad(d_out_TD, a_scaled_RI, plan, w_EDI, gather="lhs", node=node)
        if needs_weights:
            d_weights_TK = _down_bias.d_weights(d_weights_TK, d_out_TD, weights_TK, bias_ED, plan)
        if needs_bias:
            d_bias_ED = _down_bias.d_down_bias(d_out_TD, weights_TK, bias_ED, plan)
        return (
            dh_RN if needs_h else None,
            None,
            d_weights_TK if needs_weights else None,
            dw_EDI,
            d_bias_ED,
            None,
            None,
            None,
            d_out_TD if needs_residual else None,
        )


class _Compiled(torch.autograd.Function):
    """Both in one, for torch.compile, whose backward is one graph that gives its gradients away at its end.

    dW_down comes last there: made first it would live beside dH, which is larger than A'. Added to ``.grad`` (``adds``:
    of w_gate_up, of w_down) it comes first, as in eager mode. dH gets memory of its own, since a compiler copies H
    before an op that writes over it, and so a graph may be used twice.
    """

    @staticmethod
    def forward(ctx, x_TD, w_E2ID, bias_E2I, weights_TK, w_EDI, bias_ED, plan, how, residual_TD, adds):
        h_RN, a_RI = _gate_up(x_TD, w_E2ID, bias_E2I, plan, how, store_h=how.store_h, store_a=True)
        ctx.save_for_backward(x_TD, w_E2ID, bias_E2I, weights_TK, w_EDI, bias_ED, h_RN, *plan[:4])
        ctx.block_m, ctx.how, ctx.adds = plan.block_m, how, adds
        return _down(a_RI, w_EDI, bias_ED, weights_TK, plan, w_E2ID.shape[1], how, residual_TD)

    @staticmethod
    def backward(ctx, d_out_TD):
        refuse_double_backward("moe_experts")
        x_TD, w_E2ID, bias_E2I, weights_TK, w_EDI, bias_ED, h_RN, *tensors = ctx.saved_tensors
        plan, how, d_out_TD = RoutingPlan(*tensors, ctx.block_m), ctx.how, d_out_TD.contiguous()
        *needs_gate_up, needs_weights, needs_w, needs_bias, _, _, needs_residual, _ = ctx.needs_input_grad
        adds_gate_up, adds_down = ctx.adds
        d_gate_up, d_weights_TK, dw_EDI, d_bias_ED = (None, None, None), None, None, None
        if any(needs_gate_up) or needs_weights or needs_w:
            if how.recompute:
                h_RN, _ = _gate_up(x_TD, w_E2ID, bias_E2I, plan, how, store_h=True, store_a=False)
            arguments = _of_d_activation(d_out_TD, w_EDI, h_RN, weights_TK, plan, how)
            dh_RN, a_scaled_RI, d_weights_TK = torch.ops.moe_kernels.d_activation(*arguments)
            if adds_down:
                sides = d_out_TD, a_scaled_RI, *plan[:2], plan.top_k, "lhs"
                torch.ops.moe_kernels.add_to_grad_(dh_RN, *sides, w_EDI)
            d_gate_up = _d_gate_up(dh_RN, x_TD, w_E2ID, plan, how, *needs_gate_up, adds=adds_gate_up)
        if needs_w and not adds_down:
            dw_EDI, _ = _wgrad(d_out_TD, a_scaled_RI, plan, w_EDI, gather="lhs")
        if needs_weights:
            d_weights_TK = _down_bias.d_weights(d_weights_TK, d_out_TD, weights_TK, bias_ED, plan)
        if needs_bias:
            d_bias_ED = _down_bias.d_down_bias(d_out_TD, weights_TK, bias_ED, plan)
        d_residual_TD = d_out_TD if needs_residual else None
        d_weights_TK = d_weights_TK if needs_weights else None
        return *d_gate_up, d_weights_TK, dw_EDI, d_bias_ED, None, None, d_residual_TD, None


# The steps


def _decodes(x_TD, indices_TK, weights_TK, w_END, bias_EN, w_EDI, bias_ED, activation, *options) -> bool:
    """Whether decode_experts has a kernel for these arguments and few enough rows an expert to be the faster way."""
    if indices_TK.numel() > min(decode_experts.MAX_ROWS, MIN_BLOCK_M * w_END.shape[0]) or torch.compiler.is_compiling():
        return False
    if not w_END.dtype == w_EDI.dtype == x_TD.dtype == products_dtype(x_TD, x_TD.device.type):
        return False
    arguments = x_TD, indices_TK, weights_TK, w_END, bias_EN, w_EDI, bias_ED, activation, *options
    return backends.is_first("cuda", "decode_experts", decode_experts.problem(*arguments))


def _gate_up(x_TD, w_E2ID, bias_E2I, plan, how, *, store_h, store_a):
    return torch.ops.moe_kernels.gate_up(
        x_TD,
        cast(w_E2ID, how.dtype),
        cast(bias_E2I, how.dtype),
        plan.offsets_E1,
        plan.slots_R,
        plan.tiles_2M,
        plan.block_m,
        plan.top_k,
        how.activation,
        store_h,
        store_a,
        *how.options,
    )


def _down(a_RI, w_EDI, bias_ED, weights_TK, plan, inner, how, residual_TD):
    w_EDI, bias_ED = cast(w_EDI, how.dtype), cast(bias_ED, how.dtype)
    return row_product_and_sum(
        a_RI, w_EDI, bias_ED, weights_TK, plan, inner, how.accumulate_grad, residual_TD, trans_w=True
    )


def _of_d_activation(d_out_TD, w_EDI, h_RN, weights_TK, plan, how) -> tuple:
    """The arguments of both its forms."""
    return (
        d_out_TD,
        cast(w_EDI, how.dtype),
        h_RN,
        weights_TK,
        plan.offsets_E1,
        plan.slots_R,
        plan.tiles_2M,
        plan.block_m,
        how.activation,
        *how.options,
    )


def _d_activation(ctx, d_out_TD, w_EDI, h_RN, weights_TK, plan):
    """(A', dS); dH is written over H."""
    arguments = _of_d_activation(d_out_TD, w_EDI, h_RN, weights_TK, plan, ctx.how)
    a_scaled_RI, d_weights_TK = torch.ops.moe_kernels.d_activation_(*arguments)
    if not ctx.how.recompute:
        torch.autograd.graph.increment_version(h_RN)  # autograd itself then refuses a second backward
        ctx.consumed = StorageWeakRef(h_RN.untyped_storage())
    if torch.is_anomaly_enabled():  # it looks for NaN in all rows, and those of dropped slots are not written
        past_R = torch.arange(h_RN.shape[0], device=h_RN.device) >= plan.offsets_E1[-1]
        h_RN.masked_fill_(past_R[:, None], 0)
    return a_scaled_RI, d_weights_TK


def _wgrad(lhs, rhs, plan, w, *, gather, sum_lhs=False, node=None) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of ``w`` [E, lhs columns, rhs columns] and perhaps the sums of lhs rows.

    A weight that is stored transposed gets its gradient stored so: ``.grad`` then takes it without a copy. Given the
    ``node`` that takes the gradient, it is added to a ``.grad`` that is there, and there is none for autograd.
    """
    transposed = w.stride(2) != 1 and w.stride(1) == 1
    if transposed:
        lhs, rhs, gather = rhs, lhs, {"lhs": "rhs", "rhs": "lhs"}[gather]
    sides = lhs, rhs, plan.offsets_E1, plan.slots_R, plan.top_k, gather
    into = None if node is None else _accumulate_grad.buffer(w, node, lhs.dtype, transposed)
    if into is not None:
        torch.ops.moe_kernels.grouped_wgrad_(*sides, into)
        _accumulate_grad.added(into)
        return None, row_sums(rhs if transposed else lhs, plan, w.dtype) if sum_lhs else None
    dw, sums = torch.ops.moe_kernels.grouped_wgrad(*sides, sum_lhs and not transposed, w.dtype)
    if not transposed:
        return dw, sums
    return dw.mT, row_sums(rhs, plan, w.dtype) if sum_lhs else None


def _d_gate_up(dh_RN, x_TD, w_E2ID, plan, how, needs_x, needs_w, needs_bias, *, node=None, adds=False) -> tuple:
    """dX, dW_gate_up and its bias's gradient, from dH; ``adds``: a compiled graph that adds dW_gate_up to ``.grad``."""
    dx_TD = dw_E2ID = d_bias_E2I = None
    if needs_x:
        dx_TD = row_product_and_sum(
            dh_RN, cast(w_E2ID, how.dtype), None, None, plan, w_E2ID.shape[1], how.accumulate_grad, trans_w=False
        )
    if adds:
        torch.ops.moe_kernels.add_to_grad_(dx_TD, dh_RN, x_TD, *plan[:2], plan.top_k, "rhs", w_E2ID)
    elif needs_w:
        dw_E2ID, d_bias_E2I = _wgrad(dh_RN, x_TD, plan, w_E2ID, gather="rhs", sum_lhs=needs_bias, node=node)
    if needs_bias and d_bias_E2I is None:
        d_bias_E2I = row_sums(dh_RN, plan, w_E2ID.dtype)
    return dx_TD, dw_E2ID, d_bias_E2I if needs_bias else None


def _saved(ctx):
    """Unpack what ``_Down`` saved, refusing an H that an earlier backward wrote over.

    Autograd notices by H's version. Saved-tensor hooks that hand back the very same memory get past it, so the storage
    is compared too; a copy (offload) or a recomputed H (checkpointing) is another storage and passes.
    """
    refuse_double_backward("moe_experts")
    try:
        h_RN, weights_TK, w_EDI, bias_ED, *rest = ctx.saved_tensors
    except RuntimeError as error:
        if ctx.consumed is None:
            raise
        raise RuntimeError(_CONSUMED) from error
    if ctx.consumed is not None and ctx.consumed == StorageWeakRef(h_RN.untyped_storage()):
        raise RuntimeError(_CONSUMED)
    return h_RN, weights_TK, w_EDI, bias_ED, RoutingPlan(*rest[:4], ctx.block_m), rest[4:]


_CONSUMED = (
    "moe_experts: a second backward over the same graph: the first one wrote its gradient over the saved "
    'pre-activation. Run the forward again, or pass recompute="pre_activation", whose graph may be used more than once.'
)
