"""Define an op once: its schema, its contract, and where its arithmetic comes from.

Every op of the library is declared through :func:`define`. Eager calls go contract -> ``backends.resolve`` ->
kernel; under FakeTensor (torch.compile) the same contract runs and the fake returns empty outputs. No op file
does arithmetic.
"""

from collections.abc import Callable

import torch

from moe_kernels import backends

NAMESPACE = "moe_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_asked: dict[str, Callable[..., backends.Choice]] = {}  # by the name in the schema


def define(schema: str, *, check: Callable, fake: Callable, problem: Callable, kernel: Callable | None = None) -> None:
    """Register ``moe_kernels::<schema>``.

    Args:
        schema: the op's signature in torch.library notation.
        check: called with the op's arguments before anything else; raises on a broken contract.
        fake: shapes and dtypes of the outputs for FakeTensor.
        problem: maps the arguments to the :class:`backends.Problem` that picks a backend.
        kernel: ``(run, *args)`` adapter where the op's arguments differ from the backend function's; by default
            the backend function takes the op's arguments as they are.
    """
    name = schema.partition("(")[0]
    op = name.rstrip("_")  # d_activation_ is d_activation writing over its input: one backend function
    _asked[name] = lambda *args: backends.resolve(op, problem(*args))

    def eager(*args):
        check(*args)
        run = backends.resolve(op, problem(*args)).function
        return run(*args) if kernel is None else kernel(run, *args)

    def abstract(*args):
        check(*args)
        return fake(*args)

    _library.define(schema)
    _library.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", abstract, lib=_library)


def choice(name: str, *args) -> backends.Choice:
    """What runs ``torch.ops.moe_kernels.<name>`` on these arguments."""
    return _asked[name](*args)
