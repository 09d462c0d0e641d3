"""topk_route against the stock routers of Transformers, one row of the table per rule.

The router's weight is the identity, so its logits are its input, exactly. Logits are far enough apart that every
scoring keeps them apart in bf16: then torch.topk, which promises nothing for ties, has one answer.
"""

import importlib
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from moe_kernels.functional import topk_route
from tests.helpers import assert_close

pytest.importorskip("transformers")

OP = "topk_route"
T, E, K = 21, 32, 4
BF16 = torch.bfloat16


class Stock(NamedTuple):
    """A stock router, its config, how to call it, and the arguments of topk_route that do the same."""

    model: str
    name: str
    config: dict
    rule: dict
    weights: str = "fp32"  # their dtype; "model": that of the input
    bias: str | None = None  # attribute that holds it; "argument" of the forward
    order: tuple[int, int, int] = (0, 1, 2)  # of logits, weights, indices in what it returns
    fp32_logits: bool = False  # it computes them in fp32 from a half-precision input


SIGMOID = {"scoring": "sigmoid", "renormalize": True}
GROUPS = {"num_groups": 4, "top_groups": 2}
N_GROUP = {"n_group": 4, "topk_group": 2}
SCALED = {"routed_scaling_factor": 2.5}
NORM, NO_NORM = {"norm_topk_prob": True}, {"norm_topk_prob": False}
EPS = {"epsilon": 1e-20}
BIAS = "e_score_correction_bias"
AFTER = {"score_after_topk": True}
V3 = {**SIGMOID, **EPS, "scale": 2.5}
LFM2 = {**SCALED, **NORM}

STOCK = {
    "R1": Stock("deepseek_v3", "DeepseekV3TopkRouter", {**N_GROUP, **NORM, **SCALED}, {**V3, **GROUPS}, "fp32", BIAS),
    "R1-one-group": Stock(
        "glm_moe_dsa",
        "GlmMoeDsaTopkRouter",
        {"n_group": 1, "topk_group": 1, **NO_NORM, **SCALED},
        {"scoring": "sigmoid", "scale": 2.5},
        "fp32",
        BIAS,
    ),
    "R1-nemotron": Stock(
        "nemotron_h", "NemotronHTopkRouter", {**N_GROUP, **NORM, **SCALED}, {**V3, **GROUPS}, "fp32", BIAS
    ),
    "R2": Stock("qwen3_moe", "Qwen3MoeTopKRouter", NORM, {"renormalize": True}, "model"),
    "R2-plain": Stock("olmoe", "OlmoeTopKRouter", NO_NORM, {}, "model"),
    "R3": Stock("qwen3_5_moe", "Qwen3_5MoeTopKRouter", {}, {"renormalize": True}, "model"),
    "R4": Stock("mixtral", "MixtralTopKRouter", {}, {"renormalize": True}),
    "R4-minimax": Stock("minimax", "MiniMaxTopKRouter", {}, {"renormalize": True}),
    "R5": Stock("minimax_m2", "MiniMaxM2TopKRouter", {}, SIGMOID, bias="argument"),
    "R5b": Stock("minimax_m3_vl", "MiniMaxM3VLTopKRouter", {}, SIGMOID, bias=BIAS),
    "R6": Stock("deepseek_v2", "DeepseekV2TopkRouter", {"topk_method": "greedy", **N_GROUP, **SCALED}, {"scale": 2.5}),
    "R6-groups": Stock(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"topk_method": "group_limited_greedy", **N_GROUP, **SCALED},
        {"scale": 2.5, **GROUPS, "group_score": "max", "losers_zero": True},
    ),
    "R7": Stock(
        "mistral4",
        "Mistral4TopkRouter",
        {**N_GROUP, **NORM, **SCALED},
        {"renormalize": True, **EPS, "scale": 2.5, **GROUPS, "losers_zero": True, "round_scores": True},
        "model",
    ),
    "R8": Stock(
        "axk2", "AXK2TopkRouter", {**N_GROUP, **NORM, **SCALED}, {**V3, **GROUPS, "losers_zero": True}, "fp32", BIAS
    ),
    "R8-light": Stock(
        "axk2", "AXK2TopkRouter", {"n_group": None, "topk_group": None, **NORM, **SCALED}, V3, "fp32", BIAS
    ),
    "R9": Stock(
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        {"moe_norm_min": 0.3},
        {"renormalize": True, "min_sum": 0.3},
        "model",
        "moe_statics." + BIAS,
        fp32_logits=True,
    ),
    "R10": Stock("gpt_oss", "GptOssTopKRouter", {}, AFTER, "model"),
    "R10b": Stock(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterTopKRouter",
        {},
        {**AFTER, "scale": 1 / K},
        fp32_logits=True,
    ),
    "R11": Stock("granitemoe", "GraniteMoeTopKRouter", {}, AFTER, "model", order=(2, 1, 0)),
    "R11-swa": Stock("granitemoe_swa", "GraniteMoeSWATopKRouter", {}, AFTER, "model"),
    "R12-softmax": Stock(
        "cohere2_moe", "Cohere2MoeTopKRouter", {"expert_selection_fn": "softmax", **NORM}, AFTER, "model"
    ),
    "R12-sigmoid": Stock(
        "cohere2_moe",
        "Cohere2MoeTopKRouter",
        {"expert_selection_fn": "sigmoid", **NORM},
        {**AFTER, **SIGMOID, "round_scores": True},
        "model",
    ),
    "R13": Stock("afmoe", "AfmoeTokenChoiceRouter", {"route_scale": 2.5}, V3, bias="argument"),
    "R14": Stock("hy_v3", "HYV3TopKRouter", {"router_scaling_factor": 2.5}, V3, bias="argument"),
    "R15": Stock(
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {"scoring_func": "sqrtsoftplus", **SCALED},
        {**V3, "scoring": "sqrtsoftplus", "round_scores": True},
        "model",
        BIAS,
    ),
    "R16": Stock("laguna", "LagunaTopKRouter", {"moe_router_logit_softcapping": 0.0}, SIGMOID, "model", BIAS),
    "R16-capped": Stock(
        "laguna",
        "LagunaTopKRouter",
        {"moe_router_logit_softcapping": 2.0},
        {**SIGMOID, "soft_cap": 2.0},
        "model",
        BIAS,
    ),
    "R17": Stock(
        "lfm2_moe",
        "Lfm2MoeTopKRouter",
        {"use_expert_bias": False, **LFM2},
        {**SIGMOID, "epsilon": 1e-6, "scale": 2.5, "round_scores": True},
        "model",
    ),
    "R17-bias": Stock(
        "lfm2_moe",
        "Lfm2MoeTopKRouter",
        {"use_expert_bias": True, **LFM2},
        {**SIGMOID, "epsilon": 1e-6, "scale": 2.5, "round_scores": True},
        "model",
        "argument",
    ),
}


def build(stock: Stock, dtype, device):
    module = importlib.import_module(f"transformers.models.{stock.model}.modeling_{stock.model}")
    sizes = {"hidden_size": E, "num_experts_per_tok": K, "num_local_experts": E, "num_experts": E}
    router = getattr(module, stock.name)(SimpleNamespace(**sizes, **stock.config)).to(device)
    child = router.gate if hasattr(router, "gate") else router
    child.weight = torch.nn.Parameter(torch.eye(E, dtype=dtype, device=device))
    if stock.name in ("GptOssTopKRouter", "OpenAIPrivacyFilterTopKRouter"):
        router.bias = torch.nn.Parameter(torch.zeros(E, dtype=dtype, device=device))
    return router


@pytest.mark.parametrize("stock", STOCK.values(), ids=STOCK)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_against_the_stock_router(target, stock, half):
    if target.device == "cuda" and target.dtype != (BF16 if half else torch.float32):
        pytest.skip("another target's dtype")
    if half and target.device == "cpu" and target.backend == "triton":
        pytest.skip("Triton's interpreter is right in float32 only")
    dtype = BF16 if half else torch.float32
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-3, 2.5, E)
    x = torch.stack([grid[torch.randperm(E, generator=generator)] for _ in range(T)]).to(target.device, dtype)
    router = build(stock, dtype, target.device)
    bias = None
    if stock.bias is not None:
        bias = 0.5 * torch.rand(E, generator=generator).to(target.device)
        if stock.bias != "argument":
            holder = router
            *path, last = stock.bias.split(".")
            for name in path:
                holder = getattr(holder, name)
            getattr(holder, last).data = bias.view(getattr(holder, last).shape)

    theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    arguments = (bias,) if stock.bias == "argument" else ()
    given = theirs_x[None] if stock.model == "afmoe" else theirs_x
    out = router(given, *arguments)
    _, their_weights, their_indices = (out[i] for i in stock.order)

    ours_logits = ours_x.float() if stock.fp32_logits else ours_x
    weights_dtype = dtype if stock.weights == "model" else None
    weights, indices = topk_route(ours_logits, K, **stock.rule, selection_bias_E=bias, weights_dtype=weights_dtype)
    assert weights.dtype == their_weights.dtype
    assert torch.equal(indices.sort(-1).values, their_indices.sort(-1).values)

    by_expert, theirs_by_expert = indices.argsort(-1), their_indices.argsort(-1)
    ours, theirs = weights.gather(1, by_expert), their_weights.gather(1, theirs_by_expert)
    rtol = 2**-7 if theirs.dtype == BF16 else 1e-5  # one bf16 step at most
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    if half and theirs.dtype == BF16 and target.device == "cpu":
        assert (ours == theirs).float().mean() > 0.97, "rounded where the router rounds"

    d = torch.randn(T, E, generator=generator).to(target.device)
    for i, w in ((indices, weights), (their_indices, their_weights)):
        w.backward(d.gather(1, i).to(w.dtype))
    if half:
        torch.testing.assert_close(ours_x.grad.norm(), theirs_x.grad.norm(), rtol=2e-2, atol=0)
        assert (ours_x.grad - theirs_x.grad).norm() <= 2e-2 * theirs_x.grad.norm()
    else:
        assert_close(ours_x.grad, theirs_x.grad, what="d_logits")
