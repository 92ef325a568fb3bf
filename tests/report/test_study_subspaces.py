"""Similarity and drift: every figure beside chance."""

import pytest

from bayesian_lora.report.page import Picture
from tests.report.study_records import (
    SECTIONS,
    Figures,
    answers,
    entry,
    likeness,
    record,
    row,
    section,
    tables,
)

pytestmark = pytest.mark.usefixtures("blank_plots")


def compared(cosine: float) -> Figures:
    """A record of one pair."""
    pair = {"first": "sst2", "second": "cola", "whole": likeness(cosine),
            "layers": [{"layer": 3, **likeness(cosine)}],
            "modules": [{"factor_cosines": {"A": 0.5, "B": None}}]}  # fmt: skip
    labels = dict.fromkeys(
        ("cosine", "control", "factor_cosines", "phi", "baseline", "geodesic"), "x"
    )
    found = {"pairs": [pair], "labels": labels, "settings": {"repeats": 10}, "adapters": []}
    return record(similarity=entry({"comparison": found}))


@pytest.mark.parametrize(
    ("cosine", "verdict"),
    [
        (0.015, "no more alike and no further apart than chance"),
        (0.025, "more alike than chance"),
        (-0.025, "further apart than chance"),
    ],
)
def test_likeness_is_held_against_chance(cosine: float, verdict: str) -> None:
    given = compared(cosine)
    (text,) = answers(given, SECTIONS[4])
    assert text.endswith(f": {verdict}.")
    cosines, subspaces, _ = tables(given, SECTIONS[4])
    assert row(cosines, "SST-2 – CoLA")[-2:] == ["0.5000", "not available"]
    assert row(subspaces, "SST-2 – CoLA", "left (output)")[5] == "57.3°"


def test_heat_maps_name_tables_that_are_there() -> None:
    given = compared(0.5)
    layers = tables(given, SECTIONS[4])[2]
    assert "by layer" in layers.caption
    assert row(layers, "SST-2 – CoLA", "3")[2:4] == ["0.5000", "0.0000 ± 0.0100"]
    maps = [b.text for b in section(given, SECTIONS[4]).blocks if isinstance(b, Picture)]
    assert [("by layer" in text, "cosines and subspaces" in text) for text in maps] == [
        (False, True),
        (True, False),
        (False, False),
    ]


def test_drift_of_every_column_is_beside_chance() -> None:
    each = {"own": likeness(0.9), "before": likeness(0.7), "after": likeness(0.6)}
    variant = {"names": ["before", "after"], "whole": likeness(0.95), "parts": {"sst2": each}}
    given = record(drift__both=entry({"variants": {"a": variant}}))
    (words,) = answers(given, SECTIONS[5])
    assert words.endswith("a random LoRA of a's norm in its place is 141% away.")
    moved, against = tables(given, SECTIONS[5])
    chance = "0.0000 ± 0.0100"
    for where, cosine in (("all", "0.9500"), ("SST-2's", "0.9000")):
        shown = row(moved, "a", where)[2:]
        assert shown[:4] == ["0.3000", "1.4100 ± 0.0200", cosine, chance]
        assert shown[4:] == ["0.1000", chance] * 2
    assert row(against, "a", "SST-2")[2:5] == ["0.7000", "0.6000", chance]
    assert row(against, "a", "SST-2")[5:] == ["0.1000", "0.1000", chance] * 2
