"""Plain torch: the definition of correct. Any device, any float dtype; reads the offsets on the host."""


def supports(op: str, problem) -> str | None:
    return None
