"""The model and tokenizer that ``moe-kernels finetune`` trains when no checkpoint is given."""

from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
# 256 bytes and two special tokens, rounded up to a multiple of 8 for the kernels' 16-byte loads.
VOCABULARY = 264


def byte_tokenizer():
    """A tokenizer whose tokens are the 256 bytes: it needs no training, no download, and reads any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), AddedToken(PADDING, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING)


def config(max_position_embeddings: int):
    """Qwen3-MoE in small: every layer is a MoE layer, every width a multiple of 8."""
    from transformers import Qwen3MoeConfig

    tokenizer = byte_tokenizer()
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=40,
        intermediate_size=320,  # of dense layers, of which there are none
        moe_intermediate_size=96,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        # The balancing loss, as in pre-training: without it a few experts take all tokens within some hundred steps.
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save(directory: Path, *, seed: int, max_position_embeddings: int) -> None:
    """Write a checkpoint of stock Transformers with random weights that depend on ``seed`` alone."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config(max_position_embeddings))
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
