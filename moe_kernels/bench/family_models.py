"""The models of families.json: the classes of Transformers, the real sizes of one layer, and how each is built.

Sizes and router settings are those of the models' own config.json. D model width, I expert width, E experts, K of a
token, L latent width around the experts, S width of the shared expert where it is a number of its own.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from moe_kernels.bench.layer import YARDSTICK
from moe_kernels.bench.shapes import Shape

#: Of the bias that a family adds for choosing: what load balancing changes it by in a step. It moves some choices and
#: leaves the load nearly uniform.
_BIAS_STD = 1e-3
_WEIGHT_STD = 0.02


class Model(NamedTuple):
    name: str
    module: str  # of transformers.models
    config: str
    block: str
    fields: dict[str, str]  # letter of a size -> its field in the config
    sizes: dict[str, int]
    settings: dict[str, object]
    score: str  # of the router, for its weights: "sigmoid", "softmax" of all logits or "softmax_of_chosen"

    @property
    def normalises(self) -> bool:
        """Do the chosen scores of a token become weights that sum to one?"""
        return self.settings.get("norm_topk_prob", True)

    @property
    def scale(self) -> float:
        return self.settings.get("routed_scaling_factor", 1.0)

    def experts_shape(self, tokens: int) -> Shape:
        """Of the routed experts alone; their D is the latent width where there is one."""
        s = self.sizes
        return Shape(self.name, T=tokens, D=s.get("L", s["D"]), I=s["I"], E=s["E"], K=s["K"])

    def build(self, device: str) -> nn.Module:
        """Its block, in bf16 and made on the device: a copy in fp32 of the largest would fill a GPU."""
        config_module, block_module = (
            importlib.import_module(f"transformers.models.{self.module}.{kind}_{self.module}")
            for kind in ("configuration", "modeling")
        )
        sizes = {self.fields[letter]: size for letter, size in self.sizes.items()}
        config = getattr(config_module, self.config)(**sizes, **self.settings)
        config._experts_implementation = YARDSTICK
        torch.manual_seed(0)
        with torch.device(device), _default_dtype(torch.bfloat16):
            block = getattr(block_module, self.block)(config)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=_WEIGHT_STD)
        for name, bias in list(block.named_buffers()):
            # from_pretrained keeps it in fp32 where it is the router's, and not where it is the block's.
            bias = torch.empty_like(bias, dtype=torch.float32).normal_(std=_BIAS_STD)
            owner, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(owner), attribute, nn.Buffer(bias if owner else bias.bfloat16()))
        return block


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def router_of(block: nn.Module) -> nn.Module:
    return block.router if hasattr(block, "router") else block.gate


_DEEPSEEK = {"D": "hidden_size", "I": "moe_intermediate_size", "E": "n_routed_experts", "K": "num_experts_per_tok"}
_NEMOTRON = _DEEPSEEK | {"L": "moe_latent_size", "S": "moe_shared_expert_intermediate_size"}
_QWEN = _DEEPSEEK | {"E": "num_experts"}
_MIXTRAL = _DEEPSEEK | {"I": "intermediate_size", "E": "num_local_experts"}


def _grouped(name, module, config, block, sizes, scale, groups=(1, 1), fields=_DEEPSEEK, **more) -> Model:
    """A router as DeepSeek-V3's, and a shared expert."""
    settings = {"n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": True, "routed_scaling_factor": scale}
    return Model(name, module, config, block, fields, sizes, settings | more, "sigmoid")


def _nemotron(name, sizes, scale) -> Model:
    return _grouped(name, "nemotron_h", "NemotronHConfig", "NemotronHMoE", sizes, scale, fields=_NEMOTRON)


def _qwen3_5(name, sizes) -> Model:
    fields = _QWEN | {"S": "shared_expert_intermediate_size"}
    classes = "Qwen3_5MoeTextConfig", "Qwen3_5MoeSparseMoeBlock"
    return Model(name, "qwen3_5_moe", *classes, fields, sizes, {}, "softmax")


_SHARED = {"n_shared_experts": 1}  # of the experts' width
_D3, _G5 = ("deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE"), ("glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaMoE")
_AIR = ("glm4_moe", "Glm4MoeConfig", "Glm4MoeMoE")

MODELS = {
    model.name: model
    for model in (
        _grouped("deepseek-v3", *_D3, {"D": 7168, "I": 2048, "E": 256, "K": 8}, 2.5, (8, 4), **_SHARED),
        _grouped("glm-5", *_G5, {"D": 6144, "I": 2048, "E": 256, "K": 8}, 2.5, **_SHARED),
        Model(
            "minimax-m2.5",
            "minimax_m2",
            "MiniMaxM2Config",
            "MiniMaxM2SparseMoeBlock",
            _MIXTRAL,
            {"D": 3072, "I": 1536, "E": 256, "K": 8},
            {},
            "sigmoid",
        ),
        _qwen3_5("qwen3.5-35b", {"D": 2048, "I": 512, "E": 256, "K": 8, "S": 512}),
        _qwen3_5("qwen3.5-397b", {"D": 4096, "I": 1024, "E": 512, "K": 10, "S": 1024}),
        _nemotron("nemotron-3-nano", {"D": 2688, "I": 1856, "E": 128, "K": 6, "S": 3712}, 2.5),
        _nemotron("nemotron-3-super", {"D": 4096, "L": 1024, "I": 2688, "E": 512, "K": 22, "S": 5376}, 5.0),
        _nemotron("nemotron-3-ultra", {"D": 8192, "L": 2048, "I": 5120, "E": 512, "K": 22, "S": 10240}, 5.0),
        Model(
            "qwen3-30b",
            "qwen3_moe",
            "Qwen3MoeConfig",
            "Qwen3MoeSparseMoeBlock",
            _QWEN,
            {"D": 2048, "I": 768, "E": 128, "K": 8},
            {"norm_topk_prob": True},
            "softmax",
        ),
        Model(
            "gpt-oss-20b",
            "gpt_oss",
            "GptOssConfig",
            "GptOssMLP",
            _MIXTRAL,
            {"D": 2880, "I": 2880, "E": 32, "K": 4},
            {},
            "softmax_of_chosen",
        ),
        _grouped("glm-4.5-air", *_AIR, {"D": 4096, "I": 1408, "E": 128, "K": 8}, 1.0, **_SHARED),
        Model(
            "olmoe-7b",
            "olmoe",
            "OlmoeConfig",
            "OlmoeSparseMoeBlock",
            _QWEN | {"I": "intermediate_size"},
            {"D": 2048, "I": 1024, "E": 64, "K": 8},
            {"norm_topk_prob": False},
            "softmax",
        ),
        Model(
            "mixtral",
            "mixtral",
            "MixtralConfig",
            "MixtralSparseMoeBlock",
            _MIXTRAL,
            {"D": 4096, "I": 14336, "E": 8, "K": 2},
            {},
            "softmax",
        ),
    )
}
