"""The ``moe-kernels`` command.

    info        what this machine can run, op by op, and why not more
    models      every MoE class of the installed Transformers: accelerated or stock, and why
    finetune    train a MoE model on Hugging Face's Trainer, optionally against stock Transformers
    bench       time and memory of MoE layers on this GPU, beside stock Transformers

Everything heavy (torch, Transformers, rich, matplotlib) is imported by the functions that need it, so that ``--help``
and bad arguments answer at once.
"""

import importlib.util

EXTRA = "moe-kernels-train[finetune]"


class UsageError(Exception):
    """What the user gave can't be used. The text names the argument; the command prints it as one line, exit code 2."""


class RunError(Exception):
    """The work itself broke down: one line, exit code 1."""


def first_line(error: Exception) -> str:
    """One line of what ``error`` says; its kind where it says nothing."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def require(command: str, *packages: str) -> None:
    """Refuse with the name of the extra when one of ``packages`` isn't installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"{command} needs {', '.join(missing)}: pip install '{EXTRA}'")
