"""What can be known of ``--model`` before its weights are read."""

from pathlib import Path

from moe_kernels.cli import UsageError, first_line


def find(model: str) -> str:
    """The local directory of ``model`` made absolute, or a hub id as it is; refuses what can't be either."""
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UsageError(f"--model: {model} has no config.json, so it isn't a checkpoint")
            return str(path.absolute())
        if path.exists():
            raise UsageError(f"--model: {model} is a file; a checkpoint directory or a model id is needed")
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
        raise UsageError(f"--model: can't look for {model} ({first_line(error)})") from None
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise UsageError(f"--model: no such directory: {model}")
    return model


def inspect(model: str, seq_len: int):
    """Check that the model has MoE layers and fits ``seq_len`` and its tokenizer; returns the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import moe_kernels

    # What files hold decides what Transformers raises over them: any kind at all.
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:
        raise UsageError(f"--model: can't read {model} ({first_line(error)})") from None
    try:
        with torch.device("meta"):  # the modules without their weights: a big model costs nothing here
            skeleton = AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise UsageError(f"--model: {model} ({config.model_type}) is not a causal language model") from None
    except Exception as error:
        raise UsageError(f"--model: can't build {model} from its config.json ({first_line(error)})") from None
    if not moe_kernels.report(skeleton).layers:
        raise UsageError(f"--model: {model} ({type(skeleton).__name__}) has no MoE layers that moe_kernels knows of")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise UsageError(f"--model: {model} has no tokenizer that loads ({first_line(error)})") from None
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise UsageError(f"--seq-len: {seq_len} is longer than the model's {longest} positions")
    if len(tokenizer) > text.vocab_size:
        raise UsageError(
            f"--model: its tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {text.vocab_size}"
        )
    return tokenizer
