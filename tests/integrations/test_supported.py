"""The survey of the installed Transformers, and that docs/supported_models.md says what it found."""

from pathlib import Path

import pytest

import moe_kernels
from moe_kernels.cli import models
from moe_kernels.integrations.transformers import families, supported
from tests.integrations.models import FAMILIES, make_model
from tests.integrations.test_experts_forward import decorated_classes

DOCUMENT = Path(__file__).parents[2] / "docs" / "supported_models.md"
GOOD = (supported.ACCELERATED, supported.NOTHING_TO_FUSE)


@pytest.fixture(scope="module")
def survey() -> list[supported.Supported]:
    return supported.survey()


@pytest.fixture(scope="module")
def verdicts(survey) -> dict[tuple[str, str], str]:
    """(part, class) -> verdict"""
    return {(row.part, row.class_name): row.verdict for row in survey}


def test_the_document_is_current(survey, monkeypatch):
    monkeypatch.setattr(models, "survey", lambda: survey)
    version, table = models.collect()
    text = DOCUMENT.read_text()
    assert len(models.renewed(text, version, table)) > 10_000, "the generator works with every version"
    if not any(version in columns for columns in models.read(text).values()):
        pytest.skip(
            f"docs/supported_models.md has no column for Transformers {version}, so there is nothing to compare"
        )
    assert models.renewed(text, version, table) == text, "run: moe-kernels models --markdown docs/supported_models.md"


def test_every_class_is_there_and_was_built(survey, verdicts):
    assert len(survey) == len(verdicts) and survey == sorted(survey, key=lambda row: row.family)
    assert {name for part, name in verdicts if part == "experts"} == {name for _, name in decorated_classes()}
    for part, least in (("experts", 55), ("router", 64), ("block", 65)):
        assert sum(row.part == part for row in survey) >= least
    assert not [row for row in survey if row.verdict == supported.NOT_BUILT]
    assert all(row.part in supported.PARTS and row.verdict for row in survey)


def test_what_must_be_accelerated(survey):
    """Without these the library misses its aim, whatever the document says."""
    families = ("deepseek_v3", "glm_moe_dsa", "glm4_moe", "minimax_m2", "nemotron_h", "qwen3_5_moe", "qwen3_moe")
    families += ("qwen3_next", "gpt_oss", "mixtral", "olmoe")
    for row in survey:
        assert row.family not in families or row.verdict in GOOD, row
    experts = [row for row in survey if row.part == "experts" and row.verdict not in GOOD]
    assert {row.class_name for row in experts} <= {"Inkling2Experts", "MuseSparkExperts"}


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_report_says(family, verdicts):
    model = make_model(family)
    report = moe_kernels.report(model)
    rows = (*report.layers, *report.routers, *report.blocks)
    assert rows and all(row.accelerated for row in rows)
    for row in rows:
        assert verdicts[row.kind, row.class_name] == supported.ACCELERATED
    if not report.blocks:
        block = next(module for module in model.modules() if families.experts_of(module) is not None)
        assert verdicts["block", type(block).__name__] == supported.NOTHING_TO_FUSE


@pytest.mark.parametrize(
    "part, name, reason",
    [
        ("router", "ZayaRouter", "carries a state"),
        ("router", "DbrxRouter", "not switchable"),
        ("router", "DeepseekV4HashRouter", "by token id"),
        ("router", "DeepseekV4TopKRouter", "accelerated"),  # of the same block class, in later layers
        ("router", "HunYuanMoEV1Gate", "accelerated"),  # not named so
        ("block", "Llama4TextMoe", "not switchable"),
        ("block", "InklingMoE", "weighs the shared experts"),
        ("block", "Gemma4TextDecoderLayer", "a whole layer"),
    ],
)
def test_reasons(part, name, reason, verdicts):
    assert reason in verdicts[part, name]


def test_a_source_that_nobody_knows(monkeypatch, verdicts):
    """What a new release may bring: no rule, and the document says so."""
    module = supported.importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    monkeypatch.setattr(module.DeepseekV3MoE, "forward", lambda self, x: x)
    found = supported._of_file(module, Path(module.__file__).read_text())
    assert found["block", "DeepseekV3MoE"].startswith("no rule for its source")
