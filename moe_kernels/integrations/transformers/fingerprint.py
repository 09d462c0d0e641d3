"""Which arithmetic a class of Transformers has, told by its source.

Transformers copies the same forward into dozens of classes and edits some of them between releases. A fingerprint of
the source names the arithmetic, whatever the class is called, and an edited class has another one: it is then left
alone. Two forwards have one fingerprint when they differ only in the class's own name, annotations and docstrings;
methods and functions of the same file that the forward calls are part of it.
"""

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType

DIGITS = 12
#: Fields of a syntax tree that carry no meaning here, or that not every Python version has.
_SKIPPED = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx", "simple"})


def fingerprint(cls: type, method: str = "forward") -> str | None:
    """The first digits of a hash of the forward of ``cls``, or of another method; None when its source can't be had or
    may not be all."""
    return _fingerprint(cls, getattr(cls, method, None))  # a forward that is replaced later has another


@functools.cache
def _fingerprint(cls: type, forward: object) -> str | None:
    try:
        parts = list(_parts(cls, forward))
    except (OSError, TypeError, SyntaxError):  # no file, not a Python function, a lambda in mid-expression
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:DIGITS]


def _parts(cls: type, forward: object) -> Iterator[str]:
    """The normal form of the forward, then of each function that it reaches, in the order of first mention."""
    waiting, seen = [forward], set()
    while waiting:
        function = waiting.pop(0)
        if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            raise TypeError("a wrapper, whose source would be that of what it wraps")
        if function in seen:
            continue
        seen.add(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise TypeError("not a plain function")
        yield _normal(tree, cls.__name__)
        waiting += _called(tree, cls)


def _called(tree: ast.AST, cls: type) -> Iterator[FunctionType]:
    """Methods called on self, and functions of the class's own file."""
    module = vars(sys.modules.get(cls.__module__, object))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            found = inspect.getattr_static(cls, node.attr, None)
        elif isinstance(node, ast.Name):
            found = module.get(node.id)
        else:
            continue
        if isinstance(found, FunctionType) and found.__module__ == cls.__module__:
            yield found


def _normal(node: object, class_name: str) -> str:
    """A text of a syntax tree that is the same in every Python version."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign(targets=[node.target], value=node.value)
    if isinstance(node, ast.Name) and node.id == class_name:
        return "Name(its class)"
    if isinstance(node, ast.AST):
        fields = [(name, getattr(node, name, None)) for name in node._fields if name not in _SKIPPED]
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
        kept = [f"{name}={_normal(value, class_name)}" for name, value in fields if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(kept)})"
    if isinstance(node, list):
        return "[" + ", ".join(_normal(item, class_name) for item in node) + "]"
    return repr(node)
