"""The rows of checks.json: what soaks and sanitizers found, from the properties that their tests recorded.

They are saved while tests run, so that what is done outlives a run that is interrupted.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_kernels.bench import results
from moe_kernels.bench.machine import machine
from tests.gpu.soak import FULL

FILE = "checks.json"
#: Seconds between two times that a running test session saves.
PAUSE = 2


# Rows


def rows_of(properties: Iterable[tuple[str, dict]], asked: int) -> tuple[dict[str, dict], list[str]]:
    """Rows by name, and what is to be said about them; ``asked`` cases of each kind were to be checked.

    FULL cases make a soak. Of one that is not at its end, or lost cases to a worker that died or a GPU that broke,
    ``cases`` are those that were checked.
    """
    rows, notes, soaks, parts = {}, [], {}, {}
    for name, found in properties:
        if name == "sanitizer":
            parts.setdefault(found["tool"], {})[found["part"]] = found
        elif name == "soak":
            row = soaks.setdefault(found["kind"], {"cases": 0, "declined": 0, "failures": 0})
            row["cases"] += found["cases"]
            row["declined"] += found["declined"]
            row["failures"] += len(found["failures"])
    for tool, found in parts.items():
        _put_sanitizer(rows, notes, f"sanitizer/{tool}", list(found.values()))
    for kind, row in soaks.items():
        name, ran = f"soak/{kind}", row["cases"] + row["declined"]
        if asked >= FULL:
            rows[name] = row | {"first_case": 0, "last_case": asked - 1}
        if ran < max(asked, FULL):
            notes.append(f"{name}: {row['cases']} cases, {row['failures']} failures; {max(asked, FULL)} make a soak")
    return rows, notes


def _put_sanitizer(rows: dict[str, dict], notes: list[str], name: str, parts: list[dict]) -> None:
    """The sum of a tool's parts: when all have been watched, or one of them isn't clean."""
    row = {key: sum(part[key] for part in parts) for key in ("errors", "calls", "seconds")}
    row |= {"seconds": round(row["seconds"], 1), "version": parts[0]["version"]}
    if len(parts) < parts[0]["parts"]:
        notes.append(f"{name}: {row['errors']} errors in {len(parts)} parts; {parts[0]['parts']} make a row")
        if not row["errors"]:
            return
    rows[name] = row


# Saving


def save(path: Path, rows: dict[str, dict], measured_on: dict) -> list[str]:
    """Put rows into the file, whatever other processes put there meanwhile; the names of those that were put.

    A soak that is not at its end and has no failures leaves a longer one of the same code as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        before = results.load(path)
        rows = {name: row for name, row in rows.items() if not _had_more(before, name, row, measured_on)}
        if not rows:
            return []
        # Never half a file: written beside it, then moved over it
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as aside:
            if path.exists():
                shutil.copy(path, aside)
            results.save(Path(aside) / path.name, rows, measured_on)
            os.replace(Path(aside) / path.name, path)
    return list(rows)


def _had_more(before: dict, name: str, row: dict, measured_on: dict) -> bool:
    old = before["rows"].get(name)
    if old is None or "cases" not in row or row["failures"]:
        return False
    same_code = before["machines"][old["machine"]]["content_hash"] == measured_on["content_hash"]
    return same_code and old["cases"] + old["declined"] > row["cases"] + row["declined"]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among processes that save there."""
    import fcntl  # not on Windows, where nothing is saved

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Recorder:
    """A plugin of pytest, in the process that workers report to: keeps what tests recorded, and saves it."""

    def __init__(self, asked: int, saves: bool):
        self.asked, self.saves = asked, saves
        self.properties: list[tuple[str, dict]] = []
        self._saved_at = time.monotonic()
        self._where: tuple[Path, dict] | None = None  # file and machine line

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call":
            return
        self.properties += [each for each in report.user_properties if each[0] in ("soak", "sanitizer")]
        if self.properties and time.monotonic() - self._saved_at > PAUSE:
            self.save()

    def pytest_keyboard_interrupt(self) -> None:
        self.save()

    def save(self) -> list[str]:
        """The names of the rows that were put into the file, if any were to be."""
        rows, _ = rows_of(self.properties, self.asked)
        if not (self.saves and rows):
            return []
        if self._where is None:
            self._where = results.results_dir() / FILE, machine()
        put = save(self._where[0], rows, self._where[1])
        self._saved_at = time.monotonic()
        return put

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self.properties:
            return
        rows, notes = rows_of(self.properties, self.asked)
        terminalreporter.section("soak and sanitizers")
        for name, row in rows.items():
            terminalreporter.line(f"{name}: " + ", ".join(f"{value} {key}" for key, value in row.items()))
        for note in notes:
            terminalreporter.line(note)
        if self.saves and rows:
            terminalreporter.line(f"saved {', '.join(self.save()) or 'nothing'} in {FILE}")
