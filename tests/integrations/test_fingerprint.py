"""What a fingerprint sees and what it does not."""

import functools
import importlib
import sys
import textwrap

import pytest
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE, Glm4MoeTopkRouter

from moe_kernels.integrations.transformers.fingerprint import DIGITS, fingerprint

BASE = """
class Gate:
    def forward(self, x):
        y = x * 2
        return self.pick(y), Gate.__name__, helper(x)
    def pick(self, y): return y + 1
    def unrelated(self, y): return y
def helper(x): return x
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(source) -> its class ``Gate``, from a file of its own."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def build(source: str, name: str = "Gate") -> type:
        names.append(f"made_here_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return getattr(importlib.import_module(names[-1]), name)

    yield build
    for name in names:
        sys.modules.pop(name, None)


def test_copies_in_other_files_agree():
    assert fingerprint(DeepseekV3TopkRouter) == fingerprint(Glm4MoeTopkRouter) == "4f00c59f235d"
    assert fingerprint(DeepseekV3MoE) == fingerprint(Glm4MoeMoE) == "7cc7bb414bf0"
    assert len(fingerprint(nn.Linear)) == DIGITS


@pytest.mark.parametrize(
    "old, new",
    [
        ("Gate", "OtherGate"),
        ("def forward(self, x):", 'def forward(self, x: int) -> "int":\n        """Says what it does."""'),
        ("y = x * 2", "y: int = x*2  # twice"),
        ("return y\ndef helper", "return -y\ndef helper"),
    ],
    ids=["its own name", "annotations and docstring", "spelling", "a method it does not call"],
)
def test_what_does_not_count(make, old, new):
    assert old in BASE
    changed = make(BASE.replace(old, new), "OtherGate" if new == "OtherGate" else "Gate")
    assert fingerprint(changed) == fingerprint(make(BASE)) is not None


@pytest.mark.parametrize(
    "old, new",
    [
        ("x * 2", "x * 3"),
        ("y + 1", "y - 1"),
        ("def helper(x): return x", "def helper(x): return -x"),
        ("def forward(self, x)", "def forward(self, x, more=None)"),
        ("    def forward", "    @twice\n    def forward"),
    ],
    ids=["its body", "a method it calls", "a function it calls", "its parameters", "a decorator"],
)
def test_what_counts(make, old, new):
    assert old in BASE
    changed = BASE.replace(old, new)
    if "twice" in changed:
        changed = "def twice(f): return f\n" + changed
    assert fingerprint(make(changed)) != fingerprint(make(BASE))


def test_what_has_none():
    class Wrapped(nn.Linear):
        @functools.wraps(nn.Linear.forward)
        def forward(self, x):
            return -super().forward(x)

    made = type("Made", (nn.Module,), {"forward": eval("lambda self, x: x")})
    assert fingerprint(Wrapped) is None and fingerprint(made) is None and fingerprint(int) is None


def test_a_replaced_forward_has_another(make):
    cls = make(BASE)
    before = fingerprint(cls)
    cls.forward = cls.pick
    assert fingerprint(cls) not in (before, None)
