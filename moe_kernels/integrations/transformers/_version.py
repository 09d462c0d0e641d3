from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

OLDEST = "5.17.0"


def require_transformers() -> None:
    """ImportError when Transformers is missing or older than the experts interface this package is written for."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(
            f"moe_kernels' Hugging Face integration needs transformers >= {OLDEST}, which is not installed: "
            f"pip install 'transformers>={OLDEST}'. moe_kernels.functional and moe_kernels.modules work without it."
        ) from None
    if Version(found).release < Version(OLDEST).release:  # releases: a 5.17 development version will do
        raise ImportError(
            f"moe_kernels' Hugging Face integration needs transformers >= {OLDEST}, found {found}: "
            f"pip install -U 'transformers>={OLDEST}'"
        )
