"""The sdist and the wheels: what they carry, and that they install and load where no GPU, driver or torch is."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ARCH = "90"  # one architecture compiles in seconds
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

#: Run by the Python of a venv without torch, where `import moe_kernels` would fail: loads _C from its file.
LOAD = """
import importlib.util, json, pathlib, sysconfig
(file,) = pathlib.Path(sysconfig.get_path("platlib"), "moe_kernels").glob("_C*.so")
spec = importlib.util.spec_from_file_location("_C", file)
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
print(json.dumps({
    "names": dir(_C), "architectures": _C.architectures, "cuda_version": _C.cuda_version,
    "source_hash": _C.source_hash, "driver_version": _C.driver_version(),
}))
"""


def run(*command, succeeds=True, **env) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        env={**inherited, "MOE_KERNELS_CUDA_ARCHS": ARCH, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def python_of(version: str) -> str | Path | None:
    """An interpreter of ``version``: this one, one on PATH that starts (a pyenv shim may not), or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    on_path = shutil.which(f"python{version}")
    for candidate in (sys.executable, on_path, *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))):
        if candidate is None:
            continue
        code = "import sys; print('{}.{}'.format(*sys.version_info))"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return candidate
    return None


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left behind in the checkout and nothing in it is picked up."""
    work = tmp_path_factory.mktemp("sdist")
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, work / "source", ignore=leftovers)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", work, work / "source")
    (archive,) = work.glob("moe_kernels_train-*.tar.gz")
    return archive


@pytest.fixture
def venv(tmp_path):
    def make(python: str) -> Path:
        run(python, "-m", "venv", tmp_path / "venv")
        return tmp_path / "venv/bin/python"

    return make


def build_wheel(sdist: Path, python: Path | str, folder: Path, **env) -> tuple[Path, list[str], str]:
    """The wheel, the names in it, and what the build said."""
    output = run(python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist, **env)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, archive.namelist(), output


def check_extension(python: Path) -> None:
    loaded = json.loads(run(python, "-I", "-c", LOAD))
    assert loaded["architectures"] == ARCH
    assert int(loaded["cuda_version"].partition(".")[0]) >= 12
    assert len(loaded["source_hash"]) == 64
    assert loaded["driver_version"] >= 0
    assert {"combine", "routing_plan", "routing_plan_workspace"} <= set(loaded["names"])


def test_sdist_carries_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "moe_kernels").rglob("*.py")}
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@needs_nvcc
def test_wheel_with_the_extension(sdist, venv, tmp_path):
    """By another Python than test_sdist_installs, where there is one."""
    version = "3.12"
    python = python_of(version)
    if python is None:
        python, version = sys.executable, "{}.{}".format(*sys.version_info)
    python = venv(python)
    wheel, names, output = build_wheel(sdist, python, tmp_path)
    assert "moe_kernels: building the CUDA extension with " in output
    tag = "cp" + version.replace(".", "")
    assert f"-{tag}-{tag}-linux_" in wheel.name
    assert [name for name in names if name.startswith("moe_kernels/_C.") and name.endswith(".so")]
    assert not [name for name in names if name.startswith(("csrc/", "tests/"))]

    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    check_extension(python)


@needs_nvcc
def test_sdist_installs(sdist, venv):
    python = venv(sys.executable)
    run(python, "-m", "pip", "install", "--no-deps", sdist, MOE_KERNELS_BUILD_CUDA="1")
    check_extension(python)


def test_switched_off_gives_a_pure_wheel(sdist, tmp_path):
    wheel, names, output = build_wheel(sdist, sys.executable, tmp_path, MOE_KERNELS_BUILD_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    assert "moe_kernels: no CUDA extension (MOE_KERNELS_BUILD_CUDA=0)" in output


def test_without_nvcc_unset_says_so_and_forced_fails(sdist, tmp_path):
    hidden = {"CUDACXX": "/nowhere/nvcc"}
    wheel, _, output = build_wheel(sdist, sys.executable, tmp_path, **hidden)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "moe_kernels: no CUDA extension (nvcc was not found" in output

    forced = {"MOE_KERNELS_BUILD_CUDA": "1", **hidden}
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "forced", sdist)
    output = run(*command, succeeds=False, **forced)  # without -v: pip shows it all the same
    assert "MOE_KERNELS_BUILD_CUDA=1, but the CUDA extension can't be built: nvcc was not found" in output


def test_a_misspelt_switch_is_refused(sdist, tmp_path):
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sdist)
    output = run(*command, succeeds=False, MOE_KERNELS_BUILD_CUDA="yes")
    assert "MOE_KERNELS_BUILD_CUDA must be 0, 1 or unset, got 'yes'" in output
