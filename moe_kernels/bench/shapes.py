"""Layer shapes of real models (sources: the models' own config.json) and the routings to time them with.

The twelve called sonic are those of SonicMoE's benchmark (arXiv 2512.14080, figure 14), dsv3-ep8 is what one of eight
GPUs has of a DeepSeek-V3 layer.

torch is imported where it is used: the command line reads these names before it knows that it has work to do.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Kind(NamedTuple):
    """What experts are beyond their sizes."""

    activation: str = "swiglu"
    alpha: float | None = None
    limit: float | None = None
    interleaved: bool = False  # gate and up rows in turn
    biases: bool = False
    transposed: bool = False  # weights lie as [E, in, out]

    @property
    def options(self) -> tuple[float | None, float | None, bool]:
        """Of the activation, in the order of the ops' arguments."""
        return self.alpha, self.limit, self.interleaved

    @property
    def gated(self) -> bool:
        from moe_kernels.ops._contract import is_gated

        return is_gated(self.activation)


class Shape(NamedTuple):
    name: str
    T: int
    D: int
    I: int  # noqa: E741
    E: int
    K: int
    kind: Kind = Kind()

    @property
    def rows(self) -> int:
        return self.T * self.K

    @property
    def N(self) -> int:
        """Width of the pre-activation."""
        return 2 * self.I if self.kind.gated else self.I

    @property
    def forward_flops(self) -> int:
        """Up, gate and down products; a backward is twice that."""
        return 2 * self.rows * self.D * (self.N + self.I)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b", 16384, 2048, 768, 128, 8),
        Shape("qwen3.5-35b", 16384, 2048, 512, 256, 8),
        Shape("olmoe-7b", 16384, 2048, 1024, 64, 8),
        Shape("dsv3-ep8", 16384, 7168, 2048, 32, 1),
        Shape("mixtral", 8192, 4096, 14336, 8, 2),
        Shape("sonic-1.4b-n256", 40960, 768, 256, 128, 8),
        Shape("sonic-1.4b-n512", 40960, 768, 512, 64, 4),
        Shape("sonic-1.4b-n1024", 40960, 768, 1024, 32, 2),
        Shape("sonic-7b-n256", 24576, 1536, 256, 128, 8),
        Shape("sonic-7b-n512", 24576, 1536, 512, 64, 4),
        Shape("sonic-7b-n1024", 24576, 1536, 1024, 32, 2),
        Shape("sonic-30b-n256", 32768, 4096, 256, 256, 16),
        Shape("sonic-30b-n512", 32768, 4096, 512, 128, 8),
        Shape("sonic-30b-n1024", 32768, 4096, 1024, 64, 4),
        Shape("sonic-120b-n512", 32768, 4096, 512, 256, 16),
        Shape("sonic-120b-n1024", 32768, 4096, 1024, 128, 8),
        Shape("sonic-120b-n2048", 32768, 4096, 2048, 64, 4),
        Shape("tiny", 512, 256, 128, 8, 2),  # to try the harness itself
    )
}

_GPT_OSS = Kind("swiglu_oai", alpha=1.702, limit=7.0, interleaved=True, biases=True, transposed=True)
#: Layers with other experts than Qwen3's, of which the row products alone are measured.
OTHERS = {
    shape.name: shape
    for shape in (
        Shape("gpt-oss-20b", 16384, 2880, 2880, 32, 4, _GPT_OSS),
        # D is the latent width. Half the tokens of the others: beside 21.5 GB of weights and as much for one of them in
        # fp32, the rows of more would not fit on 80 GB.
        Shape("nemotron-3-ultra", 8192, 2048, 5120, 512, 22, Kind("relu2")),
    )
}

#: What is measured unless something else is asked for.
DEFAULT_SHAPES = ("qwen3-30b", "qwen3.5-35b", "olmoe-7b", "sonic-7b-n256")
#: What ``--all-shapes`` asks for: of the experts, and of the row products.
ALL_SHAPES = tuple(name for name in SHAPES if name != "tiny")
ROW_SHAPES = ("qwen3-30b", "qwen3.5-35b", "olmoe-7b", "sonic-7b-n256", "dsv3-ep8", "mixtral", *OTHERS)
ROUTINGS = ("uniform", "zipf", "one-hot")
#: Of the order in which Zipf's ranks lie over the experts.
_RANKS_SEED = 0


def zipf_ranks(experts: int) -> "Tensor":
    """The rank of each expert, from 1."""
    import torch

    return 1 + torch.randperm(experts, generator=torch.Generator().manual_seed(_RANKS_SEED))


def routing(kind: str, shape: Shape, device: str, seed: int = 0) -> "tuple[Tensor, Tensor]":
    """Routing weights [T, K] (bf16, normalised) and distinct expert indices [T, K].

    uniform: all experts alike; zipf: p ∝ rank^-1.2 by Gumbel top-k, the ranks in an order that is random and always the
    same; one-hot: the last expert in every token, the rest uniform. Kernels that take experts as they come have the
    longest one last there, when no other work is left beside it; a rank that rises with the expert would hide that.
    """
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    gumbel = -torch.rand(shape.T, shape.E, device=device, generator=generator).log_().neg_().log_()  # Gumbel noise
    if kind == "zipf":
        gumbel -= 1.2 * zipf_ranks(shape.E).to(device).log()
    elif kind == "one-hot":
        gumbel[:, -1] = torch.inf
    elif kind != "uniform":
        raise ValueError(f"routing: kind must be one of {', '.join(ROUTINGS)}, got {kind!r}")
    indices = gumbel.topk(shape.K).indices
    weights = torch.rand(shape.T, shape.K, device=device, generator=generator)
    return (weights / weights.sum(-1, keepdim=True)).bfloat16(), indices
