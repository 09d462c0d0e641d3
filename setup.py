"""Builds the CUDA extension through CMake; everything else is in pyproject.toml.

MOE_KERNELS_BUILD_CUDA   unset: build the extension if nvcc is found, and say in one line what happens
                         1: build it or fail      0: never, a pure Python wheel
MOE_KERNELS_CUDA_ARCHS   compute capabilities to compile for; CMakeLists.txt has the default
MAX_JOBS                 compile this many files at once
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_NVCC = (12, 8)  # the first to compile for every default architecture


def find_nvcc() -> str | None:
    if os.environ.get("CUDACXX"):  # an explicit choice, also of none
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def obstacle(nvcc: str | None) -> str | None:
    """Why the extension can't be built here, or None."""
    if sys.platform != "linux":
        return f"CUDA kernels are not supported on {sys.platform}"
    if nvcc is None:
        return "nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", output)
    if release is None:
        return f"{nvcc} --version did not tell its release"
    if tuple(map(int, release.groups())) < OLDEST_NVCC:
        return f"{nvcc} is release {'.'.join(release.groups())}, older than {'.'.join(map(str, OLDEST_NVCC))}"
    return None


def decide() -> str | None:
    """The nvcc to build with, or None for a pure Python package. Says which."""
    switch = os.environ.get("MOE_KERNELS_BUILD_CUDA", "")
    if switch not in ("", "0", "1"):
        sys.exit(f"MOE_KERNELS_BUILD_CUDA must be 0, 1 or unset, got {switch!r}")
    nvcc = find_nvcc()
    reason = "MOE_KERNELS_BUILD_CUDA=0" if switch == "0" else obstacle(nvcc)
    if switch == "1" and reason is not None:
        sys.exit(f"moe_kernels: MOE_KERNELS_BUILD_CUDA=1, but the CUDA extension can't be built: {reason}")
    what = f"building the CUDA extension with {nvcc}" if reason is None else f"no CUDA extension ({reason})"
    print(f"moe_kernels: {what}", file=sys.stderr)
    return nvcc if reason is None else None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp, ext.name).resolve()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_CUDA_COMPILER={ext.nvcc}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        jobs = os.environ.get("MAX_JOBS")
        try:
            # A cache of an earlier isolated build names tools that are gone.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"moe_kernels: {error}. MOE_KERNELS_BUILD_CUDA=0 installs without the CUDA extension.")


def extensions() -> list[Extension]:
    # Metadata and sdists need no compiler, and an extension would make their answers depend on this machine.
    building = {"bdist_wheel", "editable_wheel", "build_ext", "build", "install", "develop"} & set(sys.argv)
    nvcc = decide() if building else None
    if nvcc is None:
        return []
    extension = Extension("moe_kernels._C", sources=[])
    extension.nvcc = nvcc
    return [extension]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
