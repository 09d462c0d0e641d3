"""The architecture as a test: imports go down, an op has one basename everywhere, Hugging Face stays at the top."""

import ast
from pathlib import Path

import pytest

import moe_kernels
from moe_kernels import backends

PACKAGE = Path(moe_kernels.__file__).parent

#: From the top down. A layer may import the ones below it, never one above or beside.
LAYERS = ("cli", "bench", "integrations", "modules", "distributed", "functional", "ops", "backends")
#: Who may import what, beside its own layer and the ones below.
FOREIGN = {"transformers": ("integrations", "bench", "cli"), "triton": ("backends", "bench", "cli")}
#: Entry points: thin, and above everything.
TOP = ("__init__.py", "__main__.py", "auto.py")

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str | None:
    """The layer a file belongs to; None for an entry point."""
    first = path.relative_to(PACKAGE).parts[0]
    return first if first in LAYERS else None


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside a function, absolute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = (PACKAGE.name, *path.relative_to(PACKAGE).parts)
                base = ".".join(parts[: len(parts) - node.level])
                module = f"{base}.{module}" if module else base
            # "from moe_kernels import ops" imports moe_kernels.ops
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def imported_layers(path: Path) -> set[str]:
    own = (name.split(".") for name in imports_of(path) if name.split(".")[0] == PACKAGE.name)
    return {parts[1] for parts in own if len(parts) > 1 and parts[1] in LAYERS}


def ids(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_go_down(path):
    layer = layer_of(path)
    if layer is None:
        assert path.relative_to(PACKAGE).as_posix() in (*TOP, "version.py"), f"{path.name} belongs to no layer"
        return
    allowed = LAYERS[LAYERS.index(layer) :]
    for other in imported_layers(path):
        assert other in allowed, f"{layer} imports {other}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_foreign_packages_stay_in_their_layer(path):
    layer = layer_of(path)
    for name in imports_of(path):
        owners = FOREIGN.get(name.split(".")[0])
        assert owners is None or layer in owners, f"{layer or path.name} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(p) == "backends"], ids=ids)
def test_backends_do_not_know_each_other(path):
    parts = path.relative_to(PACKAGE).parts
    if len(parts) < 3:
        return  # the table
    for name in imports_of(path):
        for other in set(backends.ORDER) - {parts[1]}:
            prefix = f"{PACKAGE.name}.backends.{other}"
            assert name != prefix and not name.startswith(prefix + "."), f"{parts[1]} imports {name}"


def basenames(folder: str) -> set[str]:
    return {path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_")}


OP_FILES = {op.removesuffix("_bwd") for op in backends.OPS}
#: Of ``functional``: made of several ops, or of none.
NO_OPS = {"moe_experts", "load_balance"}


def test_one_file_per_op():
    assert basenames("ops") == OP_FILES
    assert basenames("backends/reference") == OP_FILES


@pytest.mark.parametrize("backend", backends.ORDER)
def test_a_backend_has_the_files_its_table_entry_says(backend):
    expected = {op.removesuffix("_bwd") for op in backends.IMPLEMENTS[backend]}
    assert expected <= basenames(f"backends/{backend}")
    assert basenames(f"backends/{backend}") & OP_FILES == expected, "a file the table does not name"
    assert backends.IMPLEMENTS[backend] <= set(backends.OPS)


@pytest.mark.parametrize("op", sorted(OP_FILES))
def test_every_op_has_its_tests(op):
    assert (Path(__file__).parent / "ops" / f"test_{op}.py").exists()


def test_every_function_users_call_is_one_basename():
    from moe_kernels import functional

    assert basenames("functional") - NO_OPS <= OP_FILES
    called = {name for name in functional.__all__ if name.islower()}
    assert called - NO_OPS - {"expert_load", "update_selection_bias_"} <= OP_FILES


def test_importing_the_package_does_not_import_what_it_may_not_need():
    """``import moe_kernels.functional`` on a machine without Triton or Transformers."""
    import subprocess
    import sys

    code = "import sys, moe_kernels.functional; print([m for m in ('triton', 'transformers') if m in sys.modules])"
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
