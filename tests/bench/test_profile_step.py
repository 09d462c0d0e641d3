"""The step for a profiler: what it may be asked for, without a GPU."""

import pytest

from benchmarks import profile_step


def test_a_shape_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        profile_step.main(["qwen4"])
    assert "invalid choice: 'qwen4'" in capsys.readouterr().err
