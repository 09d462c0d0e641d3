import pytest


@pytest.fixture(autouse=True)
def _poisoned(poison):
    """Every element that must be written is written: see ``poison``."""
