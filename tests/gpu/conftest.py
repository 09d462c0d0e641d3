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


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in a worker of pytest-xdist
        asked = 0 if config.getoption("soak_case", None) else config.getoption("soak", soak.FEW)
        recorder = checks.Recorder(asked, config.getoption("save", False))
        config.pluginmanager.register(recorder, "moe_kernels checks")


def pytest_collection_modifyitems(config, items):
    if "sanitizer" in (config.getoption("markexpr", "") or ""):
        return
    for item in items:
        if item.get_closest_marker("sanitizer"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest tests/gpu -m sanitizer"))
