"""What the library has to reach, beside what the committed results say it reaches.

    python -m benchmarks.floors                    everything
    python -m benchmarks.floors --issue Triton     the floors of the issues whose title has that word
    python -m benchmarks.floors --gpu nvidia-h200  by the results of that GPU alone

``floors.toml`` holds the floors and says which GPU they are for. A figure is met, short by some percent, missing, or
stale: measured on kernels with another content hash than the present ones, or beside another run's. Of several GPUs'
results a figure of the present code counts, if there is one, and of such the floors' own GPU's. A ratio, a size or a
count settles a floor on any GPU; a time of another GPU than the floors' can't, whatever it is: elsewhere. A floor with
``unless`` is also met where that row says so. Exit status 0 when all that is asked for is met.
"""

import argparse
import functools
import importlib.util
import itertools
import operator
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import GPU
from moe_kernels.bench.machine import content_hash
from moe_kernels.bench.results import ROOT, load

FLOORS = Path(__file__).with_name("floors.toml")
RESULTS = ROOT / "benchmarks" / "results"

RELATIONS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}
_STRINGS = ("what", "file", "row", "metric", "relation")
_KEYS = {*_STRINGS, "directory", "value", "times", "unless", "each"}
#: What a time of the GPU ends in; seconds are the host's.
_TIMES = ("_ms", "_us")
MET, SHORT, ELSEWHERE, MISSING, STALE = "met", "short", "elsewhere", "missing", "stale"
_COLOURS = {MET: "green", SHORT: "red", ELSEWHERE: "cyan", MISSING: "yellow", STALE: "magenta"}
#: Which of several GPUs' figures counts: first one of the present code, then one of any, then none.
_RANK = {MET: 0, SHORT: 0, STALE: 1, MISSING: 2}
#: A log has no width; this one folds no row's name. In a narrow terminal they fold, and nothing is cut.
_LOG_WIDTH, _NOTE_WIDTH = 190, 40


class BadFloors(ValueError):
    """floors.toml says something that can't be checked."""


class Unless(NamedTuple):
    """What a row may say instead of reaching the floor."""

    row: str
    metric: str
    equals: str | float


class Floor(NamedTuple):
    issue: str
    what: str
    gpu: str  # it is for
    directory: str | None  # None: that of a GPU
    file: str
    row: str
    metric: str
    relation: str
    value: float  # to reach; with times_row, the factor of its metric
    times_row: str | None
    unless: Unless | None = None

    @property
    def is_time(self) -> bool:
        """Whether it limits a time of the GPU; one beside another row's of that run is a ratio."""
        return self.metric.endswith(_TIMES) and self.times_row is None


class Verdict(NamedTuple):
    floor: Floor
    state: str
    found: float | None
    allowed: float | None
    note: str = ""  # by how much it is short, what is missing, why it counts as met, which GPU's it is


# floors.toml


def read(path: Path = FLOORS) -> list[Floor]:
    """The floors of a file, every combination of ``each`` one of its own; :class:`BadFloors` names a bad entry."""
    try:
        document = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadFloors(f"{path.name}: {error}") from None
    if document.keys() - {"gpu", "lists", "issue"}:
        raise BadFloors(f"{path.name}: has gpu, [lists] and [[issue]] and nothing else, got {', '.join(document)}")
    if not isinstance(document.get("gpu"), str):
        raise BadFloors(f"{path.name}: gpu must be a directory of benchmarks/results/, got {document.get('gpu')!r}")
    floors = []
    for place, issue in enumerate(document.get("issue", []), 1):
        if issue.keys() != {"title", "floors"}:
            raise BadFloors(f"{path.name}: issue {place} must have title and floors, got {', '.join(issue)}")
        for number, entry in enumerate(issue["floors"], 1):
            try:
                floors += _expanded(issue["title"], document["gpu"], entry, document.get("lists", {}))
            except BadFloors as error:
                label = f"floor {number} of {issue['title']!r} ({entry.get('what', '')})"
                raise BadFloors(f"{path.name}: {label}: {error}") from None
    return floors


def _expanded(issue: str, gpu: str, entry: dict, lists: dict[str, list]) -> Iterator[Floor]:
    each = {}
    for name, values in entry.get("each", {}).items():
        each[name] = lists.get(values) if isinstance(values, str) else values
        if not isinstance(each[name], list) or not each[name]:
            raise BadFloors(f"each.{name} must be a list or one of {', '.join(lists) or 'no lists'}, got {values!r}")
    _check_keys(entry)
    for combination in itertools.product(*each.values()):
        yield _floor(issue, gpu, entry, dict(zip(each, combination, strict=True)))


def _check_keys(entry: dict) -> None:
    if unknown := entry.keys() - _KEYS:
        raise BadFloors(f"unknown key {', '.join(sorted(unknown))}; known are {', '.join(sorted(_KEYS))}")
    for key in _STRINGS:
        if not isinstance(entry.get(key), str):
            raise BadFloors(f"{key} must be a string, got {entry.get(key)!r}")
    if entry["relation"] not in RELATIONS:
        raise BadFloors(f"relation must be one of {', '.join(RELATIONS)}, got {entry['relation']!r}")
    if not entry["file"].endswith(".json"):
        raise BadFloors(f"file must end in .json, got {entry['file']!r}")
    if ("value" in entry) == ("times" in entry):
        raise BadFloors("exactly one of value and times is needed")
    times = entry.get("times", {"row": "", "factor": 1.0})
    if not isinstance(times, dict) or times.keys() != {"row", "factor"} or not isinstance(times["row"], str):
        raise BadFloors(f"times must be {{ row, factor }}, got {times!r}")
    for key, number in (("value", entry.get("value", 0)), ("times.factor", times["factor"])):
        if not _is_number(number):
            raise BadFloors(f"{key} must be a number, got {number!r}")
    if "unless" in entry:
        _check_unless(entry["unless"])


def _check_unless(unless: object) -> None:
    if not isinstance(unless, dict) or unless.keys() != set(Unless._fields):
        raise BadFloors(f"unless must be {{ row, metric, equals }}, got {unless!r}")
    for key in ("row", "metric"):
        if not isinstance(unless[key], str):
            raise BadFloors(f"unless.{key} must be a string, got {unless[key]!r}")
    if not isinstance(unless["equals"], str) and not _is_number(unless["equals"]):
        raise BadFloors(f"unless.equals must be a string or a number, got {unless['equals']!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _floor(issue: str, gpu: str, entry: dict, names: dict[str, object]) -> Floor:
    def filled(text: str | None) -> str | None:
        try:
            return text if text is None else text.format_map(names)
        except (KeyError, ValueError) as error:
            raise BadFloors(f"{text!r}: no name for {error}; each has {', '.join(names) or 'none'}") from None

    times = entry.get("times", {"row": None, "factor": entry.get("value")})
    what, file, row, metric, relation = (filled(entry[key]) for key in _STRINGS)
    directory = filled(entry.get("directory"))
    unless = entry.get("unless")
    if unless is not None:
        unless = Unless(filled(unless["row"]), filled(unless["metric"]), unless["equals"])
    limit = relation, times["factor"], filled(times["row"]), unless
    return Floor(issue, what, gpu, directory, file, row, metric, *limit)


# The comparison


def judge(floor: Floor, results: dict, present_hash: str) -> Verdict:
    """One floor against the results file it names."""
    rows = [floor.row] if floor.times_row is None else [floor.row, floor.times_row]
    figures = [results["rows"].get(row, {}).get(floor.metric) for row in rows]
    found = allowed = None
    if all(map(_is_number, figures)):
        found, allowed = figures[0], floor.value if floor.times_row is None else floor.value * figures[1]
    if (excuse := floor.unless) is not None:
        row = results["rows"].get(excuse.row, {})
        if row.get(excuse.metric) == excuse.equals:
            stale = results["machines"][row["machine"]]["content_hash"] != present_hash
            verb = "was" if stale else "is"
            return Verdict(floor, STALE if stale else MET, found, allowed, f"{excuse.metric} {verb} {excuse.equals}")
    for row, figure in zip(rows, figures, strict=True):
        if not _is_number(figure):
            what = floor.metric if row in results["rows"] else "row"
            return Verdict(floor, MISSING, None, None, f"no {what}" if row == floor.row else f"no {what} of {row}")
    machines = {results["rows"][row]["machine"] for row in rows}
    distance = "" if RELATIONS[floor.relation](found, allowed) else f"by {_distance(found, allowed)}"
    if any(results["machines"][machine]["content_hash"] != present_hash for machine in machines):
        return Verdict(floor, STALE, found, allowed, f"was short {distance}" if distance else "was met")
    if len(machines) > 1:
        return Verdict(floor, STALE, found, allowed, f"{floor.times_row} is of another run")
    return Verdict(floor, SHORT if distance else MET, found, allowed, distance)


def _distance(found: float, allowed: float) -> str:
    return f"{100 * abs(found / allowed - 1):.1f} %" if allowed else f"{abs(found):g}"


def judge_of(floor: Floor, results: dict[str, dict], present_hash: str) -> Verdict:
    """One floor against the results of several GPUs, by directory, in the file it names."""
    verdicts = {gpu: judge(floor, found, present_hash) for gpu, found in results.items()}
    order = sorted(verdicts, key=lambda gpu: (gpu != floor.gpu, gpu != GPU, gpu))
    gpu = min(order, key=lambda gpu: _RANK[verdicts[gpu].state])
    verdict, own = verdicts[gpu], verdicts.get(floor.gpu)
    if gpu == floor.gpu or verdict.state == MISSING:
        return verdict
    where = f"on {_name(results[gpu])}"
    if verdict.state == STALE or not floor.is_time:
        return verdict._replace(note=f"{verdict.note} {where}".lstrip())
    note = f"{verdict.state} {where} {verdict.note}".rstrip()  # never plain met, nor plain short
    if own is not None and own.found is not None:
        note += f"; {_name(results[floor.gpu])}: {own.found:.4g} on older code"
    return verdict._replace(state=ELSEWHERE, note=note)


def _name(results: dict) -> str:
    """Of the GPU that a file's rows were measured on."""
    return next(iter(results["machines"].values()))["gpu"]["name"]


def judged(floors: list[Floor], gpus: list[str], present_hash: str) -> list[Verdict]:
    results = functools.cache(lambda directory, file: load(RESULTS / directory / file))
    return [
        judge(floor, results(floor.directory, floor.file), present_hash)
        if floor.directory is not None
        else judge_of(floor, {gpu: results(gpu, floor.file) for gpu in gpus}, present_hash)
        for floor in floors
    ]


# The command


def show(verdicts: list[Verdict]) -> None:
    counts = {state: sum(verdict.state == state for verdict in verdicts) for state in _COLOURS}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    groups = itertools.groupby(verdicts, key=lambda verdict: verdict.floor.issue)
    if importlib.util.find_spec("rich") is None:  # an extra; the comparison needs nothing but Python
        for issue, group in groups:
            print(issue)
            for verdict in group:
                print("  " + " | ".join(filter(None, _cells(verdict))))
        print(summary)
        return

    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    for issue, group in groups:
        table = Table(title=issue, title_justify="left")
        for heading in ("what", "row, metric", "floor", "found", ""):
            justify, width = "right" if heading in ("floor", "found") else "left", None if heading else _NOTE_WIDTH
            table.add_column(heading, justify=justify, overflow="fold", max_width=width)
        for verdict in group:
            what, row, metric, limit, found, said = _cells(verdict)
            said = said.replace(verdict.state, f"[{_COLOURS[verdict.state]}]{verdict.state}[/]", 1)
            table.add_row(what, f"{row}\n{metric}", limit, found, said)
        console.print(table)
    console.print(summary)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    floor, state, found, allowed, note = verdict
    limit = f"{allowed:.4g}" if allowed is not None else f"{floor.value:g}{'x' if floor.times_row else ''}"
    return (
        floor.what,
        floor.row,
        floor.metric,
        f"{floor.relation} {limit}",
        "" if found is None else f"{found:.4g}",
        state + (f"{' ' if note.startswith(('by ', 'on ')) else ', '}{note}" if note else ""),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=__doc__.splitlines()[0])
    parser.add_argument("--issue", default="", metavar="TEXT", help="only issues whose title has this text")
    parser.add_argument("--gpu", metavar="NAME", help="by the results of this one alone; default: of all there are")
    args = parser.parse_args(arguments)
    directories = sorted(path.name for path in RESULTS.iterdir() if path.is_dir() and path.name != "cpu")
    if args.gpu is not None and args.gpu not in directories:
        parser.error(f"--gpu: no results of {args.gpu!r}; there are those of {', '.join(directories)}")
    floors = read()
    wanted = [floor for floor in floors if args.issue.lower() in floor.issue.lower()]
    if not wanted:
        titles = "\n  ".join(dict.fromkeys(floor.issue for floor in floors))
        parser.error(f"--issue: no title has {args.issue!r}; the titles are\n  {titles}")
    verdicts = judged(wanted, [args.gpu] if args.gpu is not None else directories, content_hash())
    show(verdicts)
    return 0 if all(verdict.state == MET for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
