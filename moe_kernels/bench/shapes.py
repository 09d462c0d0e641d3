"""Layer shapes of real models (sources: the models' own config.json) and the routings to time them with.

torch is imported where it is used: the command line reads these names before it knows that it has work to do.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Shape(NamedTuple):
    name: str
    T: int
    D: int
    I: int  # noqa: E741
    E: int
    K: int

    @property
    def rows(self) -> int:
        return self.T * self.K

    @property
    def forward_flops(self) -> int:
        """Up, gate and down products; a backward is twice that."""
        return 6 * self.rows * self.D * self.I


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b", 16384, 2048, 768, 128, 8),
        Shape("qwen3.5-35b", 16384, 2048, 512, 256, 8),
        Shape("olmoe-7b", 16384, 2048, 1024, 64, 8),
        Shape("sonic-7b-n256", 24576, 1536, 256, 128, 8),
        Shape("mixtral", 8192, 4096, 14336, 8, 2),
        Shape("tiny", 512, 256, 128, 8, 2),  # to try the harness itself
    )
}

#: What is measured unless something else is asked for.
DEFAULT_SHAPES = ("qwen3-30b", "qwen3.5-35b", "olmoe-7b", "sonic-7b-n256")
ROUTINGS = ("uniform", "zipf", "one-hot")


def routing(kind: str, shape: Shape, device: str, seed: int = 0) -> "tuple[Tensor, Tensor]":
    """Routing weights [T, K] (bf16, normalised) and distinct expert indices [T, K].

    uniform: all experts alike; zipf: p ∝ rank^-1.2 by Gumbel top-k; one-hot: expert 0 in every token, the rest uniform.
    """
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    gumbel = -torch.rand(shape.T, shape.E, device=device, generator=generator).log_().neg_().log_()  # Gumbel noise
    if kind == "zipf":
        gumbel -= 1.2 * torch.arange(1, shape.E + 1, device=device).log()
    elif kind == "one-hot":
        gumbel[:, 0] = torch.inf
    elif kind != "uniform":
        raise ValueError(f"routing: kind must be one of {', '.join(ROUTINGS)}, got {kind!r}")
    indices = gumbel.topk(shape.K).indices
    weights = torch.rand(shape.T, shape.K, device=device, generator=generator)
    return (weights / weights.sum(-1, keepdim=True)).bfloat16(), indices
