"""Transformers' own equivalence test, unchanged, with our function in the place of its grouped_mm.

The test is in Transformers' source distribution (tests/test_modeling_common.py), which is no part of this repository.
``.ci/run`` fetches the one of the installed version; by hand:

    pip download --no-deps --no-binary transformers transformers==<version> && tar xzf transformers-*.tar.gz
    MOE_KERNELS_TRANSFORMERS_SDIST=transformers-<version> pytest tests/integrations/test_upstream_equivalence.py

It saves and reloads a model of random weights, then compares the outputs of eager, batched_mm and grouped_mm in eval
mode. Its tolerance is 1e-4, absolute too, where families initialise so small that experts which return zero pass it.
In fp32 the weights are therefore larger here: experts 1 % off then fail in every family. In half precision they are
smaller, so that 1e-4 is more than a rounding step (newer versions allow 1e-3 and 5e-3). What that can't see, one more
comparison of each call with stock's does, at unit scale and in relative terms.
"""

import copy
import importlib
import os
import re
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from moe_kernels.integrations.transformers import moe_kernels_experts_forward
from tests.helpers import relative_l2
from tests.integrations.models import ACCELERATED, FAMILIES, make_config, tokens

#: Relative L2 of an experts layer against stock's grouped_mm.
LIMITS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
VARIABLE = "MOE_KERNELS_TRANSFORMERS_SDIST"


@pytest.fixture(scope="module")
def upstream(request):
    """Their module, under a package name of its own: ours is called ``tests`` too."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} does not name the unpacked source distribution of Transformers")
    pytest.importorskip("parameterized", reason="Transformers' tests need it")
    folder = Path(folder)
    information = (folder / "PKG-INFO").read_text()
    assert f"\nVersion: {transformers.__version__}\n" in information, f"{folder} is not {transformers.__version__}"

    source = (folder / "tests" / "test_modeling_common.py").read_text()
    for marker in set(re.findall(r"\bmark\.(\w+)", source)):  # ours are strict
        request.config.addinivalue_line("markers", f"{marker}: of Transformers")

    def package(name: str, path: Path | None = None, **contents) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = [str(path)] if path else []
        vars(module).update(contents)
        return module

    name = "transformers_tests"
    stubs = {  # mixins of modules that the source distribution leaves out
        name: package(name, folder / "tests"),
        f"{name}.exporters": package(f"{name}.exporters"),
        f"{name}.exporters.test_export": package("", ExportTesterMixin=type("ExportTesterMixin", (), {})),
        f"{name}.generation": package(f"{name}.generation"),
        f"{name}.generation.test_utils": package("", GenerationTesterMixin=type("GenerationTesterMixin", (), {})),
    }
    sys.modules.update(stubs)
    yield importlib.import_module(f"{name}.test_modeling_common")
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
        del sys.modules[loaded]


def unit_scale_error(stock, experts, hidden_states, *routing) -> float:
    """Relative L2 of our output against stock's on other weights and tokens, which don't round to zero."""
    generator = torch.Generator().manual_seed(0)
    experts = copy.deepcopy(experts)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    x = torch.randn(hidden_states.shape, generator=generator).to(hidden_states.dtype)
    expected = stock(experts, x, *routing)
    return relative_l2(moe_kernels_experts_forward(experts, x, *routing), expected)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_matches_batched_and_grouped_inference(family, dtype, upstream, enabled, op_counter, monkeypatch):
    called = []
    stock = upstream.grouped_mm_experts_forward

    def ours(*args, **kwargs):
        out = moe_kernels_experts_forward(*args, **kwargs)
        called.append(unit_scale_error(stock, *args, **kwargs))
        return out

    monkeypatch.setattr(upstream, "grouped_mm_experts_forward", ours)  # what their mock of "grouped_mm" wraps
    kind = type(make_config(family))
    classes = MODEL_MAPPING[kind], MODEL_FOR_CAUSAL_LM_MAPPING[kind]

    class Tester:
        @staticmethod
        def prepare_config_and_inputs_for_common():
            ids, config = tokens(), make_config(family)
            config.initializer_range = 0.2 if dtype == "fp32" else 0.01
            return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    class Test(upstream.ModelTesterMixin, unittest.TestCase):
        all_model_classes = classes
        model_tester = Tester

    with op_counter:
        upstream._test_eager_matches_batched_and_grouped_inference(Test(), family, dtype)
    layers = FAMILIES[family][2] * len(classes)
    assert len(called) == layers
    assert max(called) < LIMITS[dtype], called
    if family in ACCELERATED:
        assert op_counter.calls["gate_up"] + op_counter.calls["decode_experts"] == 2 * layers, dict(op_counter.calls)
