"""Does training with the kernels converge like training without them?

    python -m benchmarks.convergence

Builds a checkpoint of Qwen3-30B-A3B's shape, cut to a few layers, with stock Transformers, trains it for 200 steps
with ``moe-kernels finetune --compare``, and keeps the figures and the curves under ``benchmarks/results/<gpu>/``.
Passes when the mean loss of the last 20 steps is within 1 % of stock's, and both are below half of their first loss.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from moe_kernels.bench.machine import machine
from moe_kernels.bench.results import ROOT, results_dir
from moe_kernels.cli.tiny_model import byte_tokenizer

MOST_DIFFERENCE_PERCENT = 1.0
MOST_OF_FIRST_LOSS = 0.5

#: Qwen3-30B-A3B (its config.json), apart from the number of layers.
SIZES = {
    "layers": 4,
    "hidden": 2048,
    "intermediate": 768,
    "experts": 128,
    "top-k": 8,
    "heads": 32,
    "kv-heads": 4,
    "head-dim": 128,
    "vocab": 151936,
}
#: Of the run; its learning rate is 1e-4.
RUN = {"max-steps": 200, "batch-size": 4, "seq-len": 1024, "seed": 0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (SIZES | RUN).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--lr", type=float, default=1e-4, metavar="X", help="default: 1e-4")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--work-dir", type=Path, help="keep the checkpoint and the run here instead of a temporary place"
    )
    parser.add_argument("--results-dir", type=Path, help="default: benchmarks/results/<gpu>")
    return parser.parse_args()


def make_checkpoint(directory: Path, args: argparse.Namespace) -> None:
    """Random weights in the layout of the hub's checkpoints: every expert a tensor of its own."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=3 * args.hidden,  # of dense layers, of which there are none
        moe_intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=max(4096, args.seq_len),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of random numbers: seconds on a GPU
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    del model
    gc.collect()
    torch.cuda.empty_cache()  # the runs are processes of their own and need the room


def finetune(checkpoint: Path, output: Path, args: argparse.Namespace) -> int:
    options = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in (*RUN, "lr", "dtype")]
    command = [sys.executable, "-m", "moe_kernels", "finetune", f"--model={checkpoint}", f"--output-dir={output}"]
    return subprocess.run([*command, "--compare", "--overwrite", *options], cwd=ROOT).returncode


def verdict(summary: dict) -> dict:
    runs = summary["runs"]
    difference = summary["comparison"]["last_loss_difference_percent"]
    fallen = {name: run["loss_last"] / run["losses"][0] for name, run in runs.items()}
    return {
        "last_loss_difference_percent": difference,
        "most_difference_percent": MOST_DIFFERENCE_PERCENT,
        "last_over_first_loss": fallen,
        "most_of_first_loss": MOST_OF_FIRST_LOSS,
        "passed": abs(difference) <= MOST_DIFFERENCE_PERCENT and max(fallen.values()) < MOST_OF_FIRST_LOSS,
    }


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work_dir or Path(temporary)
        make_checkpoint(work / "checkpoint", args)
        code = finetune(work / "checkpoint", work / "run", args)
        if not (work / "run" / "summary.json").exists():
            print("FAIL: the run did not finish")
            return 1
        summary = json.loads((work / "run" / "summary.json").read_text())
        if not summary["checks"]["loss_is_finite"]["passed"]:
            print("FAIL: the loss became infinite or NaN")
            return 1
        result = verdict(summary)
        for place in ("model", "output_dir"):  # temporary, and different each time
            summary["arguments"].pop(place)
        sizes = {name: getattr(args, name.replace("-", "_")) for name in SIZES}
        record = {"machine": machine(), "sizes": sizes, "convergence": result, **summary}
        target = args.results_dir or results_dir()
        target.mkdir(parents=True, exist_ok=True)
        (target / "convergence.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.copyfile(work / "run" / "loss.png", target / "convergence.png")
    passed = result["passed"] and code == 0
    fallen = ", ".join(f"{name} to {share:.2f}" for name, share in result["last_over_first_loss"].items())
    print(
        f"{'PASS' if passed else 'FAIL'}: last losses differ by {result['last_loss_difference_percent']:+.3f} % "
        f"(allowed {MOST_DIFFERENCE_PERCENT:g} %); of the first loss fell {fallen} (allowed {MOST_OF_FIRST_LOSS:g}); "
        f"checks of the run {'passed' if code == 0 else 'failed'}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
