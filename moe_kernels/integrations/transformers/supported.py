"""Which experts, routers and blocks of the installed Transformers run on us, and why not the others.

Every block is built on the meta device by its family's default config and asked what ``report`` asks; another config
may have another answer. Whether a device has kernels is another question, which ``report`` answers for a live model.
"""

import ast
import importlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from moe_kernels.integrations.transformers import families
from moe_kernels.integrations.transformers.experts import facts, judge, weights
from moe_kernels.integrations.transformers.report import EXPERTS_ON_STOCK, NOT_SWITCHABLE

ACCELERATED = "accelerated"
NOTHING_TO_FUSE = "nothing to fuse"  # a block that is a router and experts and no more
NOT_BUILT = "could not be built from the family's default config"
_NO_BLOCKS_ROUTER = "no block holds it as its router"
PARTS = ("experts", "router", "block")

#: What default configs leave open or switch off.
_OPTIONS = {
    "Dots1Config": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Gemma4TextConfig": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 8},
    "DiffusionGemmaTextConfig": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 8},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 8},
}


class Supported(NamedTuple):
    """One class."""

    family: str  # its folder in transformers.models
    part: str  # one of PARTS
    class_name: str
    verdict: str  # ACCELERATED, NOTHING_TO_FUSE, or why it stays stock


def survey() -> list[Supported]:
    """Every block class of the installed Transformers that holds experts, every experts class that Transformers
    decorates, every router class; by family. Takes about ten seconds, most of them for imports."""
    rows = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        if "self.experts = " in source:
            name = f"transformers.models.{path.parent.name}.{path.stem}"
            found = _of_file(importlib.import_module(name), source)
            rows += [Supported(path.parent.name, *key, verdict) for key, verdict in found.items()]
    return sorted(rows, key=lambda row: (row.family, PARTS.index(row.part), row.class_name))


def _of_file(module: ModuleType, source: str) -> dict[tuple[str, str], str]:
    """(part, class name) -> verdict"""
    found, blocks = {}, []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        if any("use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list):
            found["experts", node.name] = NOT_BUILT
        if _is_named_router(node.name):
            found["router", node.name] = _NO_BLOCKS_ROUTER
        if "self.experts = " in ast.get_source_segment(source, node):
            found["block", node.name] = NOT_BUILT
            blocks.append(getattr(module, node.name))
    for cls in blocks:
        for block in _built(cls, module):
            found |= _of_block(block)
    return found


def _of_block(block: nn.Module) -> dict[tuple[str, str], str]:
    experts = families.experts_of(block)
    if experts is None:
        names = {type(module).__name__ for module in block.modules()}
        keys = ("block", type(block).__name__), *(("router", name) for name in names if _is_named_router(name))
        return dict.fromkeys(keys, NOT_SWITCHABLE)
    why_experts = judge(facts(experts, *weights(experts))).reason
    found = {("experts", type(experts).__name__): why_experts, ("block", type(block).__name__): NOTHING_TO_FUSE}
    for part in families.parts(block):
        why = families.why_stays_stock(part.kind, part.module)
        if part.kind == "block" and why is None and why_experts is not None:
            why = EXPERTS_ON_STOCK
        if type(part.module) is not nn.Linear:  # Jamba's router in 5.17
            found[part.kind, type(part.module).__name__] = why
    return {key: verdict or ACCELERATED for key, verdict in found.items()}


def _is_named_router(name: str) -> bool:
    return "Router" in name or "TopKGating" in name


def _built(cls: type, module: ModuleType) -> Iterator[nn.Module]:
    """The block as the first and as the last layer, from the first config of its file that it takes."""
    first, *others = list(inspect.signature(cls.__init__).parameters.values())[1:]
    numbers = [
        p.name for p in others if p.name == "layer_idx" or (p.default is p.empty and p.kind is not p.VAR_KEYWORD)
    ]
    configuration = importlib.import_module(module.__name__.replace("modeling", "configuration"))
    for config_class in (first.annotation, *vars(configuration).values()):
        if not isinstance(config_class, type) or not issubclass(config_class, PreTrainedConfig):
            continue
        try:
            config = config_class(**_OPTIONS.get(config_class.__name__, {}))
            layers = [0, config.num_hidden_layers - 1] if numbers else [0]
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # of tensors without elements
                blocks = [cls(config, **dict.fromkeys(numbers, layer)) for layer in layers]
        except Exception:  # it is of another part of the model
            continue
        yield from blocks
        return
