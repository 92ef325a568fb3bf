"""What array checks let through, and the one line that they say otherwise.

Most of their errors are pinned where they are met: test_metrics, test_calibration and others.
"""

import numpy as np
import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.scores.array_checks import (
    checked_gaussians,
    checked_labels,
    checked_probs,
    checked_targets,
    checked_weights,
    finite,
    shaped,
)


def test_values_come_out_in_float64():
    for found in (
        finite("x", [1, 2]),
        shaped("x", np.ones((2, 3), dtype=np.float32), 2, "(K, N)"),
        checked_probs(np.full((1, 2), 0.5, dtype=np.float32)),
        checked_weights([1, 3], 2),
    ):
        assert found.dtype == np.float64
    assert checked_weights([1, 3], 2).tolist() == [0.25, 0.75]
    assert checked_labels(np.array([0, 1], dtype=np.int8), 2, 2).dtype == np.int64


def test_rounding_of_probabilities_is_forgiven_and_cut_at_1():
    assert checked_probs([[1 + 1e-9, 0.0]]).tolist() == [[1.0, 0.0]]
    with pytest.raises(InputError, match=r"sum is off 1 by 0\.001"):
        checked_probs([[0.999, 0.0]])


def test_gaussians_need_one_noise_a_member_and_one_label_an_example():
    means, noise, weights = checked_gaussians([[1.0, 2.0]], [0.5], [7.0])
    assert (means.shape, noise.tolist(), weights.tolist()) == ((1, 2), [0.5], [1.0])
    assert checked_targets([1, 2], means).tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match=r"noise_std \(2,\) does not fit means \(1, 2\)"):
        checked_gaussians([[1.0, 2.0]], [0.5, 0.5], [1.0])
    with pytest.raises(InputError, match=r"labels \(1,\) do not fit means \(1, 2\)"):
        checked_targets([1.0], means)
