"""Arguments of the ``moe-kernels`` command and its exit codes.

0 done · 1 a check failed or the work broke down · 2 bad input, said in one line · 130 interrupted
"""

import argparse
import importlib
import math
import signal
import sys
from pathlib import Path
from typing import NoReturn

from moe_kernels.bench.shapes import DEFAULT_SHAPES, ROUTINGS, SHAPES
from moe_kernels.bench.tile_rows import TUNED
from moe_kernels.cli import RunError, UsageError
from moe_kernels.version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the whole usage first; the one line that matters is easier to find alone.
        self.exit(2, f"{self.prog}: error: {message}\n")


def _positive_int(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def _seq_len(text: str) -> int:
    value = _positive_int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {text!r}: each token predicts the next")
    return value


def _name(text: str) -> str:
    if not text.strip():  # an unset shell variable; as a path it would mean the current directory
        raise argparse.ArgumentTypeError(f"must name something, got {text!r}")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="moe-kernels", description="Fast, lean Mixture-of-Experts training for Transformers v5.")
    root.add_argument("--version", action="version", version=f"moe-kernels {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="{info,models,finetune,bench}")

    info = commands.add_parser(
        "info",
        help="what this machine can run, op by op, and why not more",
        description="Versions, GPU, extension, backend of every op. Exit code 0 if any op is accelerated, else 1.",
    )
    info.add_argument("--json", action="store_true", help="print the same as JSON")

    models = commands.add_parser(
        "models",
        help="every MoE class of the installed Transformers: accelerated or stock, and why",
        description="List the experts, routers and blocks of every model family of the installed Transformers: what "
        "runs on our kernels, and why the rest doesn't.",
    )
    models.add_argument(
        "--markdown",
        metavar="FILE",
        type=_path,
        help="instead: write a Markdown table, or renew the column of this version of Transformers in it",
    )

    tune = commands.add_parser(
        "finetune",
        help="train a MoE model on Hugging Face's Trainer",
        description="Train a MoE model on Hugging Face's Trainer. Without arguments: a small Qwen3-MoE model from "
        "random weights on the source text of Python's standard library, in a few minutes on a CPU.",
    )
    tune.add_argument(
        "--model",
        metavar="PATH|ID",
        type=_name,
        help="checkpoint with MoE layers (default: a small built-in model)",
    )
    tune.add_argument(
        "--data",
        metavar="PATH|ID",
        type=_name,
        help='jsonl with a "text" field, a text file, a directory of text files, or a dataset id '
        "(default: Python's standard library)",
    )
    tune.add_argument("--output-dir", metavar="DIR", type=_path, default=Path("moe-kernels-run"))
    tune.add_argument("--overwrite", action="store_true", help="replace the output of an earlier run")
    tune.add_argument("--max-steps", metavar="N", type=_positive_int, default=400)
    tune.add_argument("--seq-len", metavar="N", type=_seq_len, default=128)
    tune.add_argument("--batch-size", metavar="N", type=_positive_int, default=8)
    tune.add_argument("--lr", metavar="X", type=_positive_float, help="default: 2e-3 built-in model, 5e-5 --model")
    tune.add_argument("--seed", metavar="N", type=_seed, default=0)
    tune.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of parameters and arithmetic; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    tune.add_argument(
        "--compare", action="store_true", help="train stock Transformers on the same batches and put it beside"
    )

    bench = commands.add_parser(
        "bench",
        help="time and memory of MoE layers on this GPU, beside stock Transformers",
        description="Check, then measure forward and backward of MoE blocks and of their experts alone, beside stock "
        "Transformers and the bound of the bare products. Needs a GPU; prints a table, draws bench.png.",
    )
    bench.add_argument(
        "--shape",
        metavar="NAME",
        nargs="+",
        choices=SHAPES,
        help=f"layers, of {', '.join(SHAPES)} (default: {' '.join(DEFAULT_SHAPES)}; with --tune: {DEFAULT_SHAPES[0]})",
    )
    bench.add_argument(
        "--routing",
        metavar="KIND",
        nargs="+",
        choices=ROUTINGS,
        default=ROUTINGS[:1],
        help=f"of the experts alone, of {', '.join(ROUTINGS)} (default: {ROUTINGS[0]})",
    )
    bench.add_argument("--peers", action="store_true", help="third-party kernels too, if they can be imported")
    place = bench.add_mutually_exclusive_group()
    place.add_argument("--output-dir", metavar="DIR", type=_path, default=Path("moe-kernels-bench"))
    place.add_argument("--save", action="store_true", help="in a checkout: among the committed results instead")
    bench.add_argument(
        "--tune",
        action="store_true",
        help="instead: try other tiles of the Triton kernels on this GPU and print the better rows of their table",
    )
    bench.add_argument(
        "--op", metavar="OP", nargs="+", choices=TUNED, help=f"with --tune: of {', '.join(TUNED)} (default: all)"
    )
    bench.add_argument("--write", action="store_true", help="with --tune, in a checkout: put the rows into configs.py")
    return root


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # A terminated run cleans up behind itself just as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return importlib.import_module(f"moe_kernels.cli.{args.command}").run(args)
    except UsageError as error:
        print(f"moe-kernels {args.command}: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"moe-kernels {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"moe-kernels {args.command}: interrupted", file=sys.stderr)
        return 130
