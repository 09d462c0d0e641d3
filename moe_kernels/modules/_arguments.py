"""Checks of constructor arguments that the modules share."""

import math


def positive(module: str, **sizes: int) -> None:
    for name, size in sizes.items():
        # bool is an int: Experts(512, True, 8) is a slip, not a size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{module}: {name} must be a positive integer, got {size!r}")


def one_of(module: str, name: str, value: object, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{module}: {name} must be one of {', '.join(map(str, accepted))}, got {value!r}")


def finite(module: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not _is_number(number):
            raise ValueError(f"{module}: {name} must be a finite number, got {number!r}")


def not_negative(module: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not _is_number(number) or number < 0:
            raise ValueError(f"{module}: {name} must be a finite number, 0 or positive, got {number!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
