"""Checks of constructor arguments that the modules share."""


def positive(module: str, **sizes: int) -> None:
    for name, size in sizes.items():
        # bool is an int: Experts(512, True, 8) is a slip, not a size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{module}: {name} must be a positive integer, got {size!r}")


def one_of(module: str, name: str, value: object, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"{module}: {name} must be one of {', '.join(map(str, accepted))}, got {value!r}")
