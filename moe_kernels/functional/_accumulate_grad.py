"""Weight gradients that are added to a ``.grad`` which is there already, as part of the product that makes them.

Autograd adds a gradient that was made first, in memory of the weights' size. Adding it ourselves, and giving autograd
none, leaves out what autograd does with a gradient: hand it to hooks, return it from ``torch.autograd.grad``. So each
weight is looked at; where one of those waits for its gradient it is made in the ordinary way, with the reason in a
warning.

Eager, the look is taken in the backward. torch.compile can't see the backward's caller nor hooks when it makes a graph;
there an op of its own takes the look when it runs, and raises what it can't mend.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moe_kernels.ops import _contract as c


def allowed_here() -> bool:
    """In a forward: nothing around it takes gradients from autograd that we would have to look for."""
    if DistributedDataParallel._active_ddp_module is None:
        return True
    _warn("DistributedDataParallel takes gradients from autograd")
    return False


def buffer(w: Tensor, node, dtype: torch.dtype, transposed: bool) -> Tensor | None:
    """In a backward: where to add the gradient of ``w``, or None if autograd is to get it.

    Args:
        w: a weight as it comes out of what was saved. Checkpointing and hooks hand back other tensors than were saved,
            so whose gradient it is says the graph.
        node: what autograd hands the gradient to.
        dtype: of the products.
        transposed: ``w`` is stored [E, columns, rows], and its gradient is made so.

    Returns:
        A contiguous tensor, of the shape of ``w`` as it is stored.
    """
    leaf, is_mT = getattr(node, "variable", None), False
    if leaf is None and node.name().partition("Backward")[0] in _TRANSPOSES and not w._backward_hooks:
        (node, _), *_ = node.next_functions
        leaf, is_mT = getattr(node, "variable", None), True
    if leaf is None or leaf.shape[0] != w.shape[0] or (is_mT and leaf.mT.stride() != w.stride()):
        _warn("a weight is neither a parameter nor the .mT of one")
        return None
    if leaf.grad is None:
        return None  # autograd keeps the gradient it gets: nothing to add, nothing to copy
    into = leaf.grad if is_mT == transposed else leaf.grad.mT
    reason = _why_autograd(leaf, node) or _why_unfit(into, dtype)
    if reason is not None:
        _warn(reason)
        return None
    torch.autograd.graph.increment_version(leaf.grad)
    return into


def added(into: Tensor) -> None:
    """After an addition was enqueued: whoever called the backward on another stream is to find it in ``.grad``.

    Autograd sees to that for a gradient it gets. The default stream needs nothing: it is where parameters are made.
    """
    if not into.is_cuda:
        return
    stream = torch.cuda.current_stream(into.device)
    if stream != torch.cuda.default_stream(into.device):
        done = stream.record_event()
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: torch.cuda.current_stream(into.device).wait_event(done)
        )


#: Of the nodes of a transposition, before the word Backward.
_TRANSPOSES = ("Transpose", "Permute")


def _why_autograd(leaf: Tensor, node) -> str | None:
    """Why autograd must get the gradient of a leaf in the backward that runs now, or None."""
    if leaf._backward_hooks:
        return "a weight has tensor hooks (register_hook), which are to see its gradient"
    if leaf._post_accumulate_grad_hooks:
        return "a weight has hooks that run when autograd has accumulated (register_post_accumulate_grad_hook)"
    try:
        accumulates = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # autograd.grad asks for this leaf, or autograd's engine isn't what runs
        accumulates = False
    return None if accumulates else "this backward does not accumulate (torch.autograd.grad, or other inputs=)"


def _why_unfit(into: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels can't add to a gradient."""
    if hasattr(into, "__tensor_flatten__"):
        return f"a weight's .grad is a {type(into).__name__}, not a plain tensor"
    if into.requires_grad:
        return "a weight's .grad requires a gradient itself (create_graph=True)"
    if into.layout != torch.strided or not into.is_contiguous():
        return "a weight's .grad is sparse or laid out otherwise than the weight"
    if into.dtype not in (dtype, torch.float32):
        return f"a weight's .grad is {into.dtype}, not float32 nor the {dtype} of the products"
    return None


def _warn(reason: str) -> bool:
    # Python shows a text once
    warnings.warn(f"moe_experts: accumulate_grad is off where {reason}.", stacklevel=2)
    return True


# Dynamo calls it while it makes a graph. What torch.compiler.assume_constant_result does, which would import Triton.
_warn._dynamo_marked_constant = True

# torch.compile


def in_graph(w: Tensor, x: Tensor) -> bool:
    """In a forward that is compiled: whether its graph adds the gradient of ``w`` to ``.grad`` itself.

    A ``.grad`` that is not there yet is autograd's to make; once it is there, the graph is made anew. That can be seen
    of a graph's input only, not of what ``w`` is the ``.mT`` of.
    """
    if not w.requires_grad:
        return False
    if not w.is_leaf or not w.is_contiguous():
        return not _warn("torch.compile makes the graph and a weight is no parameter as it is stored")
    if not x.requires_grad:
        return not _warn("torch.compile makes the graph and the experts' input needs no gradient")
    return w.grad is not None


_library = torch.library.Library("moe_kernels", "FRAGMENT")


def _run(before, lhs, rhs, offsets_E1, slots_R, top_k, gather, leaf) -> None:
    if not (leaf.is_leaf and leaf.requires_grad):
        reason = "a weight is no parameter"
    else:
        reason = _why_autograd(leaf, torch.autograd.graph.get_gradient_edge(leaf).node)
    if reason is not None:
        raise RuntimeError(
            f"moe_experts: a graph compiled with accumulate_grad adds to .grad itself, but {reason}. "
            "Compile it with accumulate_grad=False."
        )
    sides = lhs, rhs, offsets_E1, slots_R, top_k, gather
    grad = leaf.grad
    if grad is not None and _why_unfit(grad, lhs.dtype) is None:
        torch.autograd.graph.increment_version(grad)
        torch.ops.moe_kernels.grouped_wgrad_(*sides, grad)
        added(grad)
        return
    dw, _ = torch.ops.moe_kernels.grouped_wgrad(*sides, False, leaf.dtype)
    with torch.no_grad():
        leaf.grad = dw if grad is None else grad.add_(dw)
    added(dw)


def _fake(before, lhs, rhs, offsets_E1, slots_R, top_k, gather, leaf) -> None:
    if leaf.shape != (offsets_E1.shape[0] - 1, lhs.shape[1], rhs.shape[1]):
        c.fail("add_to_grad_", "leaf", leaf, "of the shape of the gradient")


# ``before`` is not touched. It is a tensor that the graph still needs, so the compiler keeps this op, and its place.
# The gradient is no argument: an autograd graph that had saved it would refuse to run once anything had added to it.
_library.define(
    "add_to_grad_(Tensor(a!) before, Tensor lhs, Tensor rhs, Tensor offsets, Tensor slots, int top_k, str gather, "
    "Tensor leaf) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # it looks up where .grad is now
)
_library.impl("add_to_grad_", _run, "CompositeExplicitAutograd")
torch.library.register_fake("moe_kernels::add_to_grad_", _fake, lib=_library)
