"""What a result was measured on: versions, GPU, driver, extension module, and the content hash of the kernels."""

import hashlib
import importlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = {".py", ".cu", ".cuh", ".h", ".cpp"}
#: Beside ``moe_kernels/``, in a checkout: the kernels and how they are compiled.
_COUNTED = ("csrc", "CMakeLists.txt", "setup.py")
#: Of ``moe_kernels/``, what no figure depends on: the reference backend and the command line.
_UNTIMED = {"reference", "cli"}
_COMMENTS = (b"#:", b"# ", b"//")


def machine() -> dict:
    """Processor, driver, versions and the content hash, as a result file records them."""
    return {"gpu": gpu(), "cpu": cpu(), "versions": versions(), "content_hash": content_hash()}


def content_hash() -> str:
    """Hash of all that a figure depends on: the kernels, the code around them, how they are compiled and measured.

    A result with another hash was measured on other code. Counts ``moe_kernels/`` and, in a checkout, ``csrc/``,
    ``CMakeLists.txt`` and ``setup.py``; not lines that are blank or only a comment. A git revision can't serve: it
    isn't known before the commit that holds the result.
    """
    digest = hashlib.sha256()
    root = _PACKAGE.parent
    for path in sorted(_counted(root)):
        name = path.relative_to(root)
        digest.update(name.as_posix().encode() + b"\0")
        lines = (line.rstrip() for line in path.read_bytes().splitlines())
        digest.update(b"\n".join(line for line in lines if line and not _is_comment(line.lstrip())) + b"\0")
    return digest.hexdigest()[:16]


def _counted(root: Path) -> Iterator[Path]:
    for top in (_PACKAGE, *(root / name for name in _COUNTED)):
        if top.is_file():
            yield top
        for path in top.rglob("*"):
            if path.suffix in _SOURCES and path.is_file() and not _UNTIMED & set(path.relative_to(root).parts):
                yield path


def _is_comment(line: bytes) -> bool:
    return line == b"#" or line.startswith(_COMMENTS)


def versions() -> dict[str, str | None]:
    from moe_kernels.version import __version__

    found = {"moe_kernels": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def gpu() -> dict | None:
    """Name, compute capability, memory and driver of the first GPU, or None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": driver(),
        "torch_cuda": torch.version.cuda,
    }


def driver() -> str | None:
    """The display driver's version, e.g. "580.95.05"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].replace("(R)", "").strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def extension() -> dict:
    """Whether ``moe_kernels._C`` is built and loads, and for what."""
    try:
        extension = importlib.import_module("moe_kernels._C")
    except ModuleNotFoundError:
        return {"built": False, "reason": "moe_kernels._C is not built"}
    except ImportError as error:
        return {"built": True, "reason": f"moe_kernels._C can't be imported ({error})"}
    version = extension.driver_version()  # 13000 means CUDA 13.0; 0 where there is no driver
    return {
        "built": True,
        "architectures": extension.architectures,
        "cuda_version": extension.cuda_version,
        "driver_supports_cuda": f"{version // 1000}.{version % 1000 // 10}" if version else None,
    }
