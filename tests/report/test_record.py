"""What a record says in words: tasks' names, data sets, sizes, errors."""

import pytest

from bayesian_lora.report.record import (
    data_sets,
    drawn,
    measured,
    naming,
    places,
    standard_error,
    title,
)
from tests.report.study_records import baselines, record


def test_a_task_that_only_shares_a_data_set_s_name_keeps_its_own() -> None:
    given = record(**baselines(sst2="imdb"))
    assert data_sets(given) == {"sst2": "imdb", "cola": "cola"}
    with naming(given):
        assert [title(task) for task in ("sst2", "cola", "mine")] == ["sst2", "CoLA", "mine"]
    assert title("sst2") == "SST-2"


def test_places_of_one_split_are_the_tasks() -> None:
    figures = {"cola": {"validation": {}}, "mnli": {"matched": {}, "mismatched": {}}}
    assert list(places(figures).values()) == ["CoLA", "MNLI matched", "MNLI mismatched"]


def test_the_error_of_an_accuracy() -> None:
    assert standard_error({"accuracy": 0.8, "n": 100}) == pytest.approx(0.04)


def test_what_n_is_says_that_a_split_is_cut_only_where_it_is() -> None:
    given = record()
    assert measured(given) == "n: examples measured on"
    given["config"]["evaluation"] = {"examples": 2000}
    assert "one fixed part of 2,000" in measured(given)


def test_what_a_fit_saw() -> None:
    recipe = {"epochs": 2, "steps_per_epoch": 80, "batch_size": 30}
    words = drawn({"cola": 7696}, recipe)
    assert words == "Drawn from 7,696 of CoLA: at most 2 epochs of 80 batches of 30"
