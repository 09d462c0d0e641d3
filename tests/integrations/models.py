"""Tiny random models of the families, and how their losses and gradients are compared."""

import torch
import transformers

from tests.helpers import relative_l2

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_NEMOTRON = {
    **_COMMON,
    "intermediate_size": 96,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}

#: name -> (config class, its arguments, experts layers)
FAMILIES = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_COMMON,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        2,
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        4,
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_MLA, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}, 2),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        {
            **_MLA,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
        2,
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_COMMON,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "head_dim": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
        },
        2,
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {
            **_COMMON,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        2,
    ),
    "nemotron_h": ("NemotronHConfig", _NEMOTRON, 2),
    "nemotron_h_latent": ("NemotronHConfig", {**_NEMOTRON, "moe_latent_size": 24}, 2),
    "mixtral": (
        "MixtralConfig",
        {
            **_COMMON,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        2,
    ),
    "olmoe": (
        "OlmoeConfig",
        {**_COMMON, "intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2},
        2,
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_COMMON,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        2,
    ),
}
ACCELERATED = tuple(FAMILIES)


def make_config(family: str):
    name, arguments, _ = FAMILIES[family]
    return getattr(transformers, name)(**arguments)


def make_model(family: str, dtype: torch.dtype = torch.float32, **options):
    """A model whose routing is far from ties: what the families initialise to is too small for that."""
    model = transformers.AutoModelForCausalLM.from_config(make_config(family), dtype=dtype, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.train()


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, ids: torch.Tensor | None = None):
    model.zero_grad()
    ids = tokens() if ids is None else ids
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(actual, expected, limit: float = 2e-5):
    """Losses and every gradient, relative L2 per tensor."""
    (loss, gradients), (loss_0, gradients_0) = actual, expected
    assert relative_l2(loss, loss_0) <= limit, (loss, loss_0)
    assert gradients.keys() == gradients_0.keys()
    errors = {name: relative_l2(gradients[name], gradients_0[name]) for name in gradients}
    # Gradients of linear attention's decay are sums that cancel: stock's own implementations differ by 4e-5 there.
    wrong = {name: e for name, e in errors.items() if not e <= (5 * limit if "linear_attn" in name else limit)}
    assert not wrong, wrong
    assert any("experts" in name for name in gradients), "no expert got a gradient: the comparison shows nothing"
