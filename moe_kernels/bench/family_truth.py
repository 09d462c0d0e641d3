"""A family's MoE block in fp32, one expert at a time, and how far an implementation's results are from it.

In fp32 neither the weights nor their gradients of the largest layers fit on a GPU. An expert's fit: its weights are
upcast, its gradients made, compared and forgotten. The selection is the implementation's own, since of two experts
with nearly equal scores either may be chosen; the routing weights are made in fp32 from the router's bf16 weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.bench.family_models import Model, router_of


class _Distance:
    """Relative L2 error of a tensor that comes in parts. Stays on the device until it is asked for."""

    def __init__(self):
        self.squared_error = self.squared_norm = 0

    def add(self, value: Tensor, truth: Tensor) -> None:
        self.squared_error = self.squared_error + _squared_norm(value.float() - truth)
        self.squared_norm = self.squared_norm + _squared_norm(truth)

    def relative(self) -> float:
        return (self.squared_error / self.squared_norm).sqrt().item()


def _squared_norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def relative_errors(
    model: Model, block: nn.Module, x_TD: Tensor, d_out_TD: Tensor, indices_TK: Tensor, found: dict[str, Tensor]
) -> dict[str, float]:
    """Of ``found``: the output "out", the gradient of "x", and those of the block's parameters by name."""
    torch.set_float32_matmul_precision("highest")  # in TF32 it would be no truth
    x, d_out = x_TD.detach().float().requires_grad_(), d_out_TD.float()
    dense = {
        name: parameter.detach().float().requires_grad_()
        for name, parameter in block.named_parameters()
        if not name.startswith("experts.")
    }

    def run(name: str, value: Tensor) -> Tensor:
        """A child of the block in fp32; what the block doesn't have changes nothing."""
        if not hasattr(block, name):
            return value
        own = {key.removeprefix(f"{name}."): value for key, value in dense.items() if key.startswith(f"{name}.")}
        return torch.func.functional_call(getattr(block, name), own, (value,))

    weights = _routing_weights(model, block, dense, x, indices_TK)
    tokens = run("fc1_latent_proj", x)
    # Nothing after the experts depends on what they computed but in a linear way, so their gradient is known already.
    probe = torch.zeros_like(tokens, requires_grad=True)
    (d_routed,) = torch.autograd.grad(run("fc2_latent_proj", probe), probe, d_out)
    distances = {}
    routed, d_tokens, d_weights = _experts(
        block.experts, tokens.detach(), weights.detach(), d_routed, indices_TK, found, distances
    )
    out = run("fc2_latent_proj", routed.requires_grad_())
    if hasattr(block, "shared_expert_gate"):
        out = out + torch.sigmoid(run("shared_expert_gate", x)) * run("shared_expert", x)
    elif hasattr(block, "shared_experts"):
        out = out + run("shared_experts", x)
    outputs, d_outputs = [weights, tokens], [d_weights, d_tokens]
    if out.grad_fn is not None:  # a block that is nothing but its experts returns their sum
        outputs, d_outputs = [out, *outputs], [d_out, *d_outputs]
    leaves = {"x": x, **dense}
    truths = dict(zip(leaves, torch.autograd.grad(outputs, leaves.values(), d_outputs)))
    for name, truth in ({"out": out.detach()} | truths).items():
        distances.setdefault(name, _Distance()).add(found[name], truth)
    return {name: distances[name].relative() for name in found}


def _routing_weights(
    model: Model, block: nn.Module, dense: dict[str, Tensor], x_TD: Tensor, indices_TK: Tensor
) -> Tensor:
    """Of a selection that is given: in fp32 the router might choose other experts."""
    name = next(name for name, child in block.named_children() if child is router_of(block))
    logits_TE = F.linear(x_TD, dense[f"{name}.weight"], dense.get(f"{name}.bias"))
    if model.score == "softmax_of_chosen":
        return logits_TE.gather(-1, indices_TK).softmax(-1)
    scores_TE = logits_TE.sigmoid() if model.score == "sigmoid" else logits_TE.softmax(-1)
    chosen_TK = scores_TE.gather(-1, indices_TK)
    if model.normalises:
        chosen_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
    return chosen_TK * model.scale


def _experts(
    experts: nn.Module,
    x_TD: Tensor,
    weights_TK: Tensor,
    d_out_TD: Tensor,
    indices_TK: Tensor,
    found: dict[str, Tensor],
    distances: dict[str, _Distance],
) -> tuple[Tensor, Tensor, Tensor]:
    """Their weighted sum and its gradients of x and of the weights; those of their parameters go to ``distances``."""
    out_TD, dx_TD, d_weights_TK = torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(weights_TK)
    parameters = dict(experts.named_parameters())
    for name in parameters:
        distances[f"experts.{name}"] = _Distance()
    counts = torch.bincount(indices_TK.flatten(), minlength=experts.num_experts).tolist()
    for expert, slots in enumerate(indices_TK.flatten().argsort(stable=True).split(counts)):
        rows = slots // indices_TK.shape[1]
        own = {name: parameter[expert].detach().float().requires_grad_() for name, parameter in parameters.items()}
        x, weights = x_TD[rows].requires_grad_(), weights_TK.flatten()[slots].requires_grad_()
        out = _expert(experts, x, own) * weights[:, None]
        dx, d_weights, *gradients = torch.autograd.grad(out, [x, weights, *own.values()], d_out_TD[rows])
        out_TD.index_add_(0, rows, out.detach())
        dx_TD.index_add_(0, rows, dx)
        d_weights_TK.view(-1)[slots] = d_weights
        for name, truth in zip(own, gradients, strict=True):
            distances[f"experts.{name}"].add(found[f"experts.{name}"][expert], truth)
    return out_TD, dx_TD, d_weights_TK


def _expert(experts: nn.Module, x_RD: Tensor, own: dict[str, Tensor]) -> Tensor:
    """One expert by the module's own activation, without the routing weight."""

    def product(value: Tensor, name: str) -> Tensor:
        value = value @ (own[name] if experts.is_transposed else own[name].T)
        return value + own[f"{name}_bias"] if experts.has_bias else value

    h = product(x_RD, "gate_up_proj" if experts.has_gate else "up_proj")
    return product(experts._apply_gate(h) if experts.has_gate else experts.act_fn(h), "down_proj")
