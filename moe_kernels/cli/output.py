"""An output directory that appears complete or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

from moe_kernels.cli import UsageError

SUMMARY = "summary.json"


class OutputDir:
    """Collects a run's files beside ``path`` and moves them into place in one rename.

    Usage: ``with OutputDir(path, overwrite) as output: ... write under output.staging ...; output.publish()``.
    Leaving the block without ``publish`` (an error, Ctrl-C) removes everything that was written.
    """

    def __init__(self, path: Path, overwrite: bool):
        self.path = path.expanduser().absolute()
        self.staging: Path
        self._made_parents: list[Path] = []
        self._check(overwrite)

    def _check(self, overwrite: bool) -> None:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UsageError(f"--output-dir: {self.path} exists and is not a directory")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not overwrite:
                raise UsageError(f"--output-dir: {self.path} is not empty; name another one or add --overwrite")
            if not (self.path / SUMMARY).is_file():
                # --overwrite deletes: never let a mistyped path cost somebody a home directory.
                raise UsageError(
                    f"--output-dir: {self.path} has no {SUMMARY}, so it isn't an earlier run; not replaced"
                )
        ancestor = next(parent for parent in self.path.parents if parent.exists())
        if not ancestor.is_dir():
            raise UsageError(f"--output-dir: {ancestor} is not a directory")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise UsageError(f"--output-dir: {ancestor} is not writable")

    def __enter__(self) -> "OutputDir":
        parent = self.path.parent
        self._made_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that the final rename stays on one file system.
            self.staging = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.partial-", dir=parent))
        except OSError as error:
            raise UsageError(f"--output-dir: can't write in {parent} ({error.strerror})") from None
        return self

    def publish(self) -> None:
        old = None
        self.staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        if self.path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.parent))
            os.replace(self.path, old)
        os.replace(self.staging, self.path)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        if not self.path.exists():
            for parent in self._made_parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
