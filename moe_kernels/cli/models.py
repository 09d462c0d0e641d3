"""``moe-kernels models``: every MoE class of the installed Transformers, accelerated or stock and why.

As Markdown it is docs/supported_models.md, with a column for each version of Transformers that it was run with: a run
renews its own version's column and keeps the others.
"""

import argparse
import collections

import transformers

from moe_kernels.cli import UsageError, require
from moe_kernels.integrations.transformers.supported import ACCELERATED, NOTHING_TO_FUSE, PARTS, survey

#: (family, part, class) -> version of Transformers -> verdict
Table = dict[tuple[str, str, str], dict[str, str]]

_ABSENT = "-"
_HEADER = ("family", "part", "class")
_TITLE = "# Supported models\n"
_TEXT = """
Written by `moe-kernels models --markdown docs/supported_models.md`, once with each version of Transformers below; a
test fails when a column is not what the code says.

Each row is a class of Transformers: every experts class that it decorates with `use_experts_implementation`, every
block that holds experts (`self.experts`, JetMoE's attention too), every router (what a block holds as one, or is named
so). The verdict is what `moe_kernels.report(model)` says of a block that is built from its family's default config;
another config may have another answer, and so may a device without kernels.

- *accelerated*: experts run on our ops, a router on `topk_route`; a block adds its shared expert's output inside the
  sum over the experts, or inside the latent projection after them.
- *nothing to fuse*: the block is a router and experts and no more. Its stock forward calls them.
- anything else is why stock code runs. A stock block still calls the router and experts of its own rows.
- `{absent}`: this version has no such class.

"""


def run(args: argparse.Namespace) -> int:
    if args.markdown is None:
        require("models", "rich")
    version, table = collect()
    if args.markdown is None:
        show(version, table)
        return 0
    try:
        before = args.markdown.read_text() if args.markdown.exists() else _TITLE
        if not before.startswith(_TITLE):
            raise UsageError(f"--markdown: {args.markdown} exists and is no list that this command wrote")
        args.markdown.write_text(renewed(before, version, table))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--markdown: can't renew {args.markdown} ({error})") from None
    return 0


def collect() -> tuple[str, Table]:
    """(version of Transformers, verdicts of its classes)"""
    version = transformers.__version__
    return version, {(row.family, row.part, row.class_name): {version: row.verdict} for row in survey()}


def show(version: str, table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable("family", "part", "class", "verdict", title=f"MoE classes of Transformers {version}")
    last = None
    for (family, *names), verdicts in table.items():
        verdict = verdicts[version]
        style = "green" if _is_good(verdict) else "yellow"
        shown.add_row(family if family != last else "", *names, verdict, style=style)
        last = family
    console = Console()
    console.print(shown)
    for part, counts in _counts(table, version).items():
        console.print(f"{part}: {counts}", highlight=False)


def renewed(document: str, version: str, table: Table) -> str:
    """The document with this version's column renewed."""
    merged = {
        key: {other: verdict for other, verdict in verdicts.items() if other != version}
        for key, verdicts in read(document).items()
    }
    for key, verdicts in table.items():
        merged.setdefault(key, {}).update(verdicts)
    merged = {key: verdicts for key, verdicts in merged.items() if verdicts}
    return write(merged)


def read(document: str) -> Table:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in document.splitlines() if line[:1] == "|"]
    starts = [index for index, cells in enumerate(lines) if tuple(cells[:3]) == _HEADER]
    if not starts:
        return {}
    versions, rows = lines[starts[0]][3:], lines[starts[0] + 2 :]
    return {
        (family, part, name.strip("`")): {v: cell for v, cell in zip(versions, cells) if cell != _ABSENT}
        for family, part, name, *cells in rows
    }


def write(table: Table) -> str:
    versions = sorted({v for verdicts in table.values() for v in verdicts}, key=lambda v: [*map(_number, v.split("."))])
    counts = {version: _counts(table, version) for version in versions}
    lines = [_row("", *versions), _row(*["---"] * (1 + len(versions)))]
    lines += [_row(part, *(counts[version][part] for version in versions)) for part in PARTS]
    lines += ["", _row(*_HEADER, *versions), _row(*["---"] * (3 + len(versions)))]
    for family, part, name in sorted(table, key=lambda key: (key[0], PARTS.index(key[1]), key[2])):
        verdicts = table[family, part, name]
        lines.append(_row(family, part, f"`{name}`", *(verdicts.get(version, _ABSENT) for version in versions)))
    return _TITLE + _TEXT.format(absent=_ABSENT) + "\n".join(lines) + "\n"


def _counts(table: Table, version: str) -> dict[str, str]:
    found = {part: collections.Counter() for part in PARTS}
    for (_, part, _), verdicts in table.items():
        if version in verdicts:
            found[part][verdicts[version] if _is_good(verdicts[version]) else "stock"] += 1
    return {
        part: f"{counts.total()}: " + ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        for part, counts in found.items()
    }


def _is_good(verdict: str) -> bool:
    return verdict in (ACCELERATED, NOTHING_TO_FUSE)


def _number(text: str) -> int:
    digits = "".join(character for character in text if character.isdigit())
    return int(digits or 0)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
