"""An output directory that appears complete or not at all."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from moe_kernels.cli import RunError, UsageError, first_line

SUMMARY = "summary.json"


class OutputDir:
    """Collects a run's files beside ``path`` and moves them into place in one rename.

    An empty directory that is there already may be a mount point or have a parent that isn't ours to write in, so it
    can't be renamed over: files are collected inside it and moved up one by one, summary.json last.

    Usage: ``with OutputDir(path, overwrite) as output: ... write under output.staging ...; output.publish()``.
    Leaving the block without ``publish`` (an error, Ctrl-C) removes everything that was written.
    """

    def __init__(self, path: Path, overwrite: bool):
        self.staging: Path
        self._made_parents: list[Path] = []
        try:
            self.path = path.expanduser().absolute()
            self._check(overwrite)
            self._inside = self.path.is_dir() and not any(self.path.iterdir())
            self._replace = self.path.is_dir() and not self._inside
        except (OSError, RuntimeError) as error:  # a name too long, no permission to look, an unknown ~user
            raise UsageError(f"--output-dir: can't use {path} ({first_line(error)})") from None

    def _check(self, overwrite: bool) -> None:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UsageError(f"--output-dir: {self.path} exists and is not a directory")
        ancestor = next(parent for parent in self.path.parents if parent.exists())
        if self.path.is_dir() and not any(self.path.iterdir()):
            ancestor = self.path
        elif self.path.is_dir():
            if not overwrite:
                raise UsageError(f"--output-dir: {self.path} is not empty; name another one or add --overwrite")
            if not (self.path / SUMMARY).is_file():
                # --overwrite deletes: never let a mistyped path cost somebody a home directory.
                raise UsageError(
                    f"--output-dir: {self.path} has no {SUMMARY}, so it isn't an earlier run; not replaced"
                )
            if self.path.is_mount():
                raise UsageError(f"--output-dir: {self.path} is a mount point and can't be replaced; empty it first")
        if not ancestor.is_dir():
            raise UsageError(f"--output-dir: {ancestor} is not a directory")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise UsageError(f"--output-dir: {ancestor} is not writable")

    def __enter__(self) -> "OutputDir":
        parent = self.path.parent
        self._made_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            if self._inside:
                parent = self.path
                self.staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
                return self
            parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that the final rename stays on one file system.
            self.staging = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.partial-", dir=parent))
        except OSError as error:
            raise UsageError(f"--output-dir: can't write in {parent} ({error.strerror})") from None
        return self

    def publish(self) -> None:
        try:
            self._move_up() if self._inside else self._rename()
        except OSError as error:
            raise RunError(f"--output-dir: can't put the run in {self.path} ({error.strerror})") from None

    def _move_up(self) -> None:
        moved = []
        try:
            for file in sorted(self.staging.iterdir(), key=lambda file: file.name == SUMMARY):
                target = self.path / file.name
                if target.exists():  # put there since we looked
                    raise FileExistsError(errno.EEXIST, f"{file.name} is there already")
                os.rename(file, target)
                moved.append(target)
        except BaseException:  # Ctrl-C too
            for target in moved:
                os.rename(target, self.staging / target.name)
            raise
        self.staging.rmdir()

    def _rename(self) -> None:
        old = None
        self.staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        try:
            if self._replace:
                old = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.parent))
                os.replace(self.path, old)
            os.replace(self.staging, self.path)
        except BaseException:
            if old is not None and not self.path.exists():
                os.replace(old, self.path)  # the earlier run back to its place
            elif old is not None:
                shutil.rmtree(old, ignore_errors=True)
            raise
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
