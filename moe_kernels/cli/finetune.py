"""``moe-kernels finetune``: train, compare, check, and leave a directory that says what happened."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_kernels.bench import machine
from moe_kernels.cli import RunError, UsageError, checkpoint, data, first_line, info, require, results
from moe_kernels.cli.output import SUMMARY, OutputDir

_HERE = Path(__file__).parent
#: What the fresh process may differ by: reassociated sums in float32, one rounding of an activation in bfloat16.
RELOAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    require("finetune", "rich", "matplotlib", "tokenizers", "transformers", "accelerate")
    output = OutputDir(args.output_dir, args.overwrite)
    data.check(args.data)
    model = None if args.model is None else checkpoint.find(args.model)
    # Fast tokenizers warn about a fork that never happens here.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from moe_kernels.cli import tiny_model

    hub_logging.set_verbosity_error()  # it warns at each of its attempts to reach a hub that isn't there
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gpu = machine.gpu()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if gpu else "float32"
    _check_backend("cuda" if gpu else "cpu", dtype)
    tokenizer = tiny_model.byte_tokenizer() if model is None else checkpoint.inspect(model, args.seq_len)
    train, held_out = data.sequences(
        args.data, tokenizer, seq_len=args.seq_len, wanted=args.max_steps * args.batch_size, seed=args.seed
    )
    lr = args.lr or (2e-3 if model is None else 5e-5)

    with output:
        scratch = output.staging / "scratch"
        scratch.mkdir()
        if model is None:
            model = str(scratch / "initial")
            tiny_model.save(Path(model), seed=args.seed, max_position_embeddings=args.seq_len)
        job = _Job(args, model, dtype, lr, "cuda" if gpu else "cpu", scratch)
        job.save_tokens(train, held_out)
        saved = output.staging / "checkpoint"
        ours = job.train("moe_kernels", checkpoint=saved)
        tokenizer.save_pretrained(saved)
        reloaded = job.reload(saved)
        stock = job.train("stock") if args.compare else None

        summary = results.summarize(
            ours=ours,
            stock=stock,
            reloaded=reloaded,
            tolerance=RELOAD_TOLERANCE[dtype],
            on_gpu=gpu is not None,
            about={
                "versions": machine.versions(),
                "device": {
                    "type": job.device,
                    "dtype": dtype,
                    "name": gpu["name"] if gpu else machine.cpu(),
                    "gpu": gpu,
                },
                "arguments": {**vars(args), "output_dir": str(args.output_dir), "dtype": dtype, "lr": lr},
                "data": {
                    "source": args.data or "Python's standard library",
                    "train_sequences": len(train),
                    "held_out_sequences": len(held_out),
                    "passes_over_train": args.max_steps * args.batch_size / len(train),
                },
            },
        )
        results.draw(summary, output.staging)
        summary["total_seconds"] = time.perf_counter() - started
        (output.staging / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        shutil.rmtree(scratch)
        output.publish()

    results.show(summary, output.path)
    return 0 if all(check["passed"] for check in summary["checks"].values()) else 1


def _check_backend(device: str, dtype: str) -> None:
    """Refuse a forced backend that can't run here, which would raise in the first step."""
    import torch

    from moe_kernels import backends

    try:
        if backends.forced_backend() is None:
            return
        for op in backends.OPS:
            backends.resolve(op, info.problem(op, torch.device(device), getattr(torch, dtype)))
    except ValueError as error:
        raise UsageError(error) from None
    except RuntimeError as error:
        raise UsageError(f"MOE_KERNELS_BACKEND: {first_line(error)}") from None


class _Job:
    """Everything the runs of one command share, so that they differ in the implementation only."""

    def __init__(self, args, model: str, dtype: str, lr: float, device: str, scratch: Path):
        self.device, self.scratch = device, scratch
        self.shared = {
            "model": model,
            "dtype": dtype,
            "lr": lr,
            "device": device,
            "steps": args.max_steps,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "train": str(scratch / "train.npy"),
            "held_out": str(scratch / "held_out.npy"),
            "scratch": str(scratch / "trainer"),
            "package_root": str(_HERE.parents[1]),
            "report_fields": results.REPORT_FIELDS,
        }

    def save_tokens(self, train, held_out) -> None:
        import numpy

        numpy.save(self.shared["train"], train)
        numpy.save(self.shared["held_out"], held_out)

    def train(self, name: str, checkpoint: Path | None = None) -> dict:
        own = {"ours": name == "moe_kernels", "title": name, "checkpoint": checkpoint and str(checkpoint)}
        result = self._run("worker.py", name, own, f"training with {name} broke down (its error is above)")
        if "error" in result:
            raise UsageError(result["error"])
        return result

    def reload(self, checkpoint: Path) -> dict:
        own = {"checkpoint": str(checkpoint)}
        return self._run("reload.py", "reload", own, "stock Transformers can't load and run the checkpoint just saved")

    def _run(self, script: str, name: str, own: dict, failure: str) -> dict:
        result = self.scratch / f"{name}.result.json"
        spec = self.scratch / f"{name}.json"
        spec.write_text(json.dumps({**self.shared, **own, "result": str(result)}))
        # -P: Python would put the script's directory first on the path, where our file names could hide packages.
        code = _call([sys.executable, "-P", str(_HERE / script), str(spec)])
        if code != 0:
            raise RunError(f"{failure}; nothing was written")
        return json.loads(result.read_text())


def _call(command: list[str]) -> int:
    """Run a child and return its exit status. It is stopped when we are, except by SIGKILL, which leaves it running."""
    environment = dict(os.environ)
    # One GPU: with several in sight the Trainer would switch to DataParallel.
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # Ctrl-C reaches every process of the terminal. The child inherits that it ignores it, and is stopped below.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = subprocess.Popen(command, env=environment)
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
