"""What `ray-pipeline status` says of a run."""

import math

import pytest

from ray_pipeline.monitoring import phase_state
from ray_pipeline.status import describe_run


@pytest.mark.parametrize(("gain", "error"), [(0.0, 0.0), (0.25, math.nan)], ids=["same in all tiles", "one tile"])
def test_a_hint_gain_without_a_standard_error_is_told_alone(half_run, gain, error):
    state = phase_state.load(half_run.state_file)
    for hint, standard_error in (("", 0.125), ("/canny", error)):
        state.phase("two").metrics |= {
            f"val_loss_right_hints{hint}": 0.5,
            f"val_loss_shuffled_hints{hint}": 0.5 + gain,
            f"hint_gain{hint}": gain,
            f"hint_gain_standard_error{hint}": standard_error,
        }
    state.save(half_run.state_file)
    text = describe_run(half_run.folder)
    assert f"shuffled {0.5 + gain:.4f}: gain {gain:.4f} = {gain / 0.125:.1f} paired standard errors" in text
    assert f"with canny alone, right 0.5000, shuffled {0.5 + gain:.4f}: gain {gain:.4f}\n" in text + "\n"


def test_a_validation_loss_of_0_at_the_start_has_no_ratio(half_run):
    state = phase_state.load(half_run.state_file)
    state.phase("two").baseline_val_loss = 0.0
    state.save(half_run.state_file)
    assert "at the start 0.0000\n" in describe_run(half_run.folder)
