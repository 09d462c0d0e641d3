"""One training run in a process of its own: ``python worker.py SPEC.json``.

A fresh process for each run, ours and stock, makes peak memory and timing comparable, and nothing of the first model
is left on the GPU when the second one loads. This file is run by its path and imports ``moe_kernels`` only when the
run is ours: the stock run is Transformers and nothing else.
"""

import contextlib
import json
import math
import os
import re
import sys
import time
from logging import Handler
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

STOCK = "grouped_mm"  # what Transformers picks by default, named so that nothing can change it


class Sequences(torch.utils.data.Dataset):
    """``length`` samples over the packed sequences, starting over where they run out, so every batch is full."""

    def __init__(self, path: str, length: int):
        self.tokens = numpy.load(path, mmap_mode="r")
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        ids = torch.from_numpy(self.tokens[index % len(self.tokens)].astype(numpy.int64))
        return {"input_ids": ids, "labels": ids}


class Recorder(TrainerCallback):
    """Loss and wall time of every step, and the progress bar.

    The Trainer reads the loss back at every logged step, which waits for the device: times taken there are whole steps.
    """

    def __init__(self, title: str, steps: int, tokens_per_step: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.tokens_per_step = tokens_per_step
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task(title, total=steps, figures="")

    def on_train_begin(self, args, state, control, **_):
        self.progress.start()
        self.last = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        now = time.perf_counter()
        self.losses.append(float(logs["loss"]))
        self.seconds.append(now - self.last)
        self.last = now
        speed = self.tokens_per_step * len(self.seconds[-20:]) / sum(self.seconds[-20:])
        self.progress.update(self.task, advance=1, figures=f"loss {self.losses[-1]:.3f}  {speed:,.0f} tokens/s")

    def on_train_end(self, args, state, control, **_):
        self.progress.stop()


def train(spec: dict) -> dict:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if spec["ours"]:
        # Where the command itself was found, in case it runs from a checkout that isn't installed.
        sys.path.append(spec["package_root"])
        import moe_kernels

        moe_kernels.enable()
    set_seed(spec["seed"])
    dtype = getattr(torch, spec["dtype"])
    choice = {} if spec["ours"] else {"experts_implementation": STOCK}
    model, refusal = load(spec["model"], dtype=dtype, **choice)
    if refusal is not None:
        return {"error": f"--model: {refusal}"}

    steps, batch = spec["steps"], spec["batch_size"]
    data = Sequences(spec["train"], steps * batch)
    recorder = Recorder(spec["title"], steps, batch * data.tokens.shape[1])
    on_gpu = spec["device"] == "cuda"
    trainer = Trainer(
        model=model,
        train_dataset=data,
        callbacks=[recorder],
        args=TrainingArguments(
            output_dir=spec["scratch"],
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=spec["lr"],
            warmup_steps=math.ceil(steps / 20),
            lr_scheduler_type="linear",
            seed=spec["seed"],
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            logging_steps=1,
            logging_nan_inf_filter=False,  # a loss that turned NaN must show
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        recorder.progress.stop()

    warm_up = min(10, max(1, steps // 4)) if steps > 1 else 0  # the first step compiles and allocates
    measured = recorder.seconds[warm_up:]
    result = {
        "implementation": "moe_kernels" if spec["ours"] else STOCK,
        "losses": recorder.losses,
        "step_seconds": recorder.seconds,
        "warm_up_steps": warm_up,
        "tokens_per_second": len(measured) * recorder.tokens_per_step / sum(measured),
        "peak_bytes": peak_bytes(on_gpu),
        "held_out_loss": held_out_loss(trainer.model, spec["held_out"], batch),
        "model_class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if spec["ours"]:
        result["report"] = [
            {field: getattr(row, field) for field in spec["report_fields"]} for row in moe_kernels.report(model).layers
        ]
    if spec["checkpoint"]:
        model.save_pretrained(spec["checkpoint"])
    return result


def load(name: str, **options) -> tuple[torch.nn.Module | None, str | None]:
    """(model, None), or (None, why it can't be had): every weight must come from the checkpoint, in its shape."""
    said = []
    with listening(said):
        try:
            # Weights of another shape are then named like missing ones, instead of an error that names none.
            model, loaded = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:  # unreadable weights come as many kinds of error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            # Which weights could not be put together of their parts stands in the log alone.
            if unmade := sorted({name for text in said for name in re.findall(r"(?m)^(\S+) *\| CONVERSION", text)}):
                reason = f"its weights for {shortened(unmade)} don't fit together"
            return None, f"can't load {name} ({reason})"
    mismatched = [key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]]  # (name, shape, shape)
    # Drawn at random. Tied ones, which checkpoints leave out, are not in the list.
    lacking = sorted({*loaded["missing_keys"], *mismatched})
    if lacking:
        others = f", {len(mismatched)} of them in another shape" if mismatched else ""
        return None, f"{name} lacks {len(lacking)} of the weights the model needs{others} ({shortened(lacking)})"
    return model, None


def shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@contextlib.contextmanager
def listening(said: list[str]):
    """Collect what Transformers warns of, instead of printing it."""
    handler = Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.disable_default_handler()
    logging.add_handler(handler)
    try:
        yield
    finally:
        logging.remove_handler(handler)
        logging.enable_default_handler()
        logging.set_verbosity(verbosity)


def held_out_loss(model, path: str, batch_size: int) -> float:
    """Mean loss over all held-out sequences."""
    tokens = torch.from_numpy(numpy.load(path).astype(numpy.int64)).to(model.device)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in tokens.split(batch_size):
            total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    return total / len(tokens)


def peak_bytes(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    # Not getrusage where this exists: its maximum survives exec, so a child would inherit the parent's.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    result = train(spec)
    assert spec["ours"] or "moe_kernels" not in sys.modules
    partial = Path(spec["result"] + ".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, spec["result"])


if __name__ == "__main__":
    main()
