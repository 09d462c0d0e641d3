"""The rows of checks.json: what soaks and sanitizers found, from the properties that their tests recorded."""

from collections.abc import Iterable

from tests.gpu.soak import FULL

FILE = "checks.json"


def rows_of(properties: Iterable[tuple[str, dict]], cases: int) -> tuple[dict[str, dict], list[str]]:
    """Rows by name, and why others are left out; ``cases`` of each kind is what was asked for.

    A soak counts if it had FULL cases of its kind or more and lost none to a worker that died or a GPU that broke.
    """
    rows, notes, soaks = {}, [], {}
    for name, found in properties:
        if name == "sanitizer":
            rows[f"sanitizer/{found['tool']}"] = {key: value for key, value in found.items() if key != "tool"}
        elif name == "soak":
            row = soaks.setdefault(found["kind"], {"cases": 0, "declined": 0, "failures": 0})
            row["cases"] += found["cases"]
            row["declined"] += found["declined"]
            row["failures"] += len(found["failures"])
    for kind, row in soaks.items():
        name, ran = f"soak/{kind}", row["cases"] + row["declined"]
        if ran >= max(cases, FULL):
            rows[name] = row | {"first_case": 0, "last_case": cases - 1}
        else:
            notes.append(f"{name}: {row['cases']} cases, {row['failures']} failures; {max(cases, FULL)} make a row")
    return rows, notes
