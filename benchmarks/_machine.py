"""Where a figure comes from: the machine line, the content hash of the kernels, the place of the result file."""

import hashlib
import re
from pathlib import Path

from moe_kernels.cli.machine import cpu, gpu, versions

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = {".py", ".cu", ".cuh", ".h", ".cpp"}
_COMMENTS = (b"#:", b"# ", b"//")


def content_hash() -> str:
    """Hash of the kernels' sources: a result with another hash was measured on other code.

    The reference backend doesn't count (it is never timed), nor do lines that are blank or only a comment. A git
    revision can't serve: it isn't known before the commit that holds the result.
    """
    digest = hashlib.sha256()
    for path in sorted(p for folder in ("moe_kernels", "csrc") for p in (ROOT / folder).rglob("*")):
        if path.suffix in _SOURCES and path.is_file() and path.parent.name != "reference":
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
            lines = (line.rstrip() for line in path.read_bytes().splitlines())
            digest.update(
                b"\n".join(line for line in lines if line and not line.lstrip().startswith(_COMMENTS)) + b"\0"
            )
    return digest.hexdigest()[:16]


def machine() -> dict:
    """Processor, driver, versions and the content hash, as a result file records them."""
    found = gpu()
    return {"gpu": found, "cpu": cpu(), "versions": versions(), "content_hash": content_hash()}


def results_dir() -> Path:
    """``benchmarks/results/<gpu>``, created; ``cpu`` without a GPU."""
    found = gpu()
    name = found["name"] if found else "cpu"
    directory = ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
