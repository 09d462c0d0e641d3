"""Options of the soak and the sanitizers, and their rows in ``benchmarks/results/<gpu>/checks.json``.

They are options of ``pytest tests/gpu``, or of a file in it; a run of all tests takes the defaults.
"""

import pytest

from tests.gpu import checks, soak


def pytest_addoption(parser):
    group = parser.getgroup("moe_kernels")
    group.addoption("--soak", type=int, default=soak.FEW, metavar="N", help="random problems of each kind")
    group.addoption("--soak-case", action="append", metavar="KIND-NUMBER", help="one of them alone, as a failure says")
    group.addoption("--save", action="store_true", help="put rows into benchmarks/results/<gpu>/checks.json")


def pytest_collection_modifyitems(config, items):
    if "sanitizer" in (config.getoption("markexpr", "") or ""):
        return
    for item in items:
        if item.get_closest_marker("sanitizer"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest tests/gpu -m sanitizer"))


def pytest_terminal_summary(terminalreporter, config):
    """In the process that the workers report to."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    properties = [property for report in reports for property in getattr(report, "user_properties", ())]
    if not any(name in ("soak", "sanitizer") for name, _ in properties):
        return
    rows, notes = checks.rows_of(properties, config.getoption("soak", soak.FEW))
    terminalreporter.section("soak and sanitizers")
    for name, row in rows.items():
        terminalreporter.line(f"{name}: " + ", ".join(f"{value} {key}" for key, value in row.items()))
    for note in notes:
        terminalreporter.line(note)
    if rows and config.getoption("save", False):
        from moe_kernels.bench.machine import machine
        from moe_kernels.bench.results import results_dir, save

        path = results_dir() / checks.FILE
        save(path, rows, machine())
        terminalreporter.line(f"saved {', '.join(rows)} to {path}")
