"""Pieces of Markdown: prose of limited width, lines of a table, and the figures in them."""

import textwrap
from collections.abc import Iterable

_WIDTH = 140
#: Stands where a row lacks a figure.
DASH = "-"


def filled(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def has(row: dict, metric: str) -> bool:
    return isinstance(row.get(metric), int | float)


def figure(row: dict, metric: str, how: str) -> str:
    return format(row[metric], how) if has(row, metric) else DASH
