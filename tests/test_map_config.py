"""Configs without sampling, with a plateau, with a tracker: what counts, and what is refused."""

import pytest

from bayesian_lora.config import build_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.cells import settings_of


def test_keys_that_cannot_count_are_the_same_run_whatever_they_say() -> None:
    given = build_config({}, ["sampler.name=map", "sampler.chains=3"])
    idle = ["sampler.num_samples=20", "sampler.thin=7", "sampler.rho=0.1", "sampler.temperature=0"]
    other = build_config({}, ["sampler.name=map", "sampler.chains=3", *idle])
    assert settings_of(given) == settings_of(other)
    assert given.sampler.num_samples == 3
    tracked = build_config({}, ["sampler.name=map", "sampler.chains=3", "track=mlflow"])
    assert settings_of(tracked) == settings_of(given)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("sampler.name=map", "train.starts=shared"), "the 4 members would all be"),
        (("train.schedule=plateau", "data.validation_share=0"), "schedule=plateau needs data held"),
        (("sampler.name=mpa",), r"did you mean map\?"),
        (("train.plateau_factor=1",), "less than 1"),
        (("track=tensorbord",), "track"),
    ],
)
def test_contradictions_are_one_line(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build_config({}, list(keys))
    assert "\n" not in str(error.value)
