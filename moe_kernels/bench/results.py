"""Result files: ``benchmarks/results/<gpu>/<topic>.json`` in a checkout, each row with what it was measured on.

    {"machines": {key: line}, "rows": {"experts/qwen3-30b/uniform/moe_kernels": {"step_ms": 7.5, "machine": key}}}

A row's name says what was measured, from the general to the particular; its values are plain numbers or words.
Measuring a row again replaces it and leaves the others, so a file may hold rows of several runs, each with its own
machine line (GPU, driver, versions, content hash, copy and matmul rate of that run).
"""

import hashlib
import json
import re
from pathlib import Path

from moe_kernels.bench.machine import gpu

ROOT = Path(__file__).resolve().parent.parent.parent


def results_dir() -> Path:
    """``benchmarks/results/<gpu>`` of the checkout; ``cpu`` without a GPU."""
    found = gpu()
    name = found["name"] if found else "cpu"
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"machines": {}, "rows": {}}


def save(path: Path, rows: dict[str, dict], machine: dict) -> None:
    """Put ``rows`` of one run into the file, replacing those of the same name; forget machines no row refers to."""
    key = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:8]
    found = load(path)
    found["rows"] |= {name: {**row, "machine": key} for name, row in rows.items()}
    found["machines"][key] = machine
    used = {row["machine"] for row in found["rows"].values()}
    found["machines"] = {key: line for key, line in found["machines"].items() if key in used}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
