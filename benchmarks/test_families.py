"""One layer of every family at real size, beside stock and its bound: families.json."""

import pytest
import torch

from moe_kernels.bench import families
from moe_kernels.bench.family_models import MODELS
from moe_kernels.bench.results import results_dir

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_family(session, timed, model):
    if (reason := families.why_not(model, torch.cuda.get_device_properties(0).total_memory)) is not None:
        pytest.skip(reason)
    try:
        timed(*families.run(session, model))
    finally:
        session.save(results_dir())  # now: one that is killed later saves nothing
