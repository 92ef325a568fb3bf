"""Gates: held against their target; MCC, sizes and what they were fitted on are shown."""

import pytest

from tests.report.study_records import (
    SECTIONS,
    Figures,
    answers,
    entry,
    gate,
    record,
    row,
    tables,
)

pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.mark.parametrize(("share", "met"), [(0.96, "met"), (0.94, "not met")])
def test_gates_are_held_against_their_target(share: float, met: str) -> None:
    given = record(gate__sequence=entry(gate(share)))
    (words,) = answers(given, SECTIONS[7])
    assert f"{share:.1%} on CoLA" in words
    assert f"is {met}." in words
    table = tables(given, SECTIONS[7])[0]
    cells = next(cells for cells in table.rows if cells[1].text == "CoLA")
    assert (cells[6].text, cells[6].tone) == (f"{share:.1%}", "good" if met == "met" else "bad")
    doubt = tables(given, SECTIONS[7])[2]
    assert doubt.missing == ["one member"]


def with_mcc() -> Figures:
    found = gate(0.96)
    own = found["figures"]["tasks"]["cola"]
    own |= {"joint_mcc": 0.31, "given_task": own["given_task"] | {"mcc": 0.32}}
    found["alone"]["cola"] |= {"mcc": None, "mcc_reason": "constant"}
    return found


def test_mcc_of_a_task_that_has_it() -> None:
    table = tables(record(gate__token=entry(with_mcc())), SECTIONS[7])[0]
    heads = [f"MCC {how}" for how in ("without labels", "given task", "alone")]
    assert table.columns[-3:] == heads
    assert row(table, "per token", "CoLA")[-3:] == ["0.3100", "0.3200", "not available"]
    assert "constant" in table.missing
    without = tables(record(gate__token=entry(gate(0.96))), SECTIONS[7])[0]
    assert not [head for head in without.columns if head.startswith("MCC")]


def test_every_table_says_on_how_many_examples() -> None:
    for table in tables(record(gate__token=entry(gate(0.96))), SECTIONS[7]):
        at = list(table.columns).index("n")
        assert {cells[at].text for cells in table.rows} <= {"100", "200"}, table.caption


def test_what_a_gate_was_fitted_on() -> None:
    def note(**gates: Figures) -> str:
        steps = {f"gate__{name}": entry(figures) for name, figures in gates.items()}
        return tables(record(**steps), SECTIONS[7])[0].note

    drawn = "Drawn from 90 of SST-2 and 90 of CoLA"
    passes = f"{drawn}: at most 3 epochs of one pass over the largest of them, in batches of 30"
    assert f"{passes}. n:" in note(token=gate(0.9))
    arrow = gate(0.9) | {"training": {"trained": False}}
    assert f"{passes}; the gate per arrow is not trained" in note(token=gate(0.9), arrow=arrow)
    old = gate(0.9)
    del old["recipe"]
    assert f"{drawn}; epochs and batches were not recorded" in note(token=old)


def test_posterior_ensembles_with_mcc_and_sizes() -> None:
    step: Figures = {
        "n": 1043,
        "map": {"accuracy": {"mean": 0.7}, "nll": {"mean": 0.6}, "mcc": {"mean": 0.2}},
        "ensemble": {"k": 4, "accuracy": 0.71, "nll": 0.59, "mcc": 0.25},
        "uncertainty": {"mutual_information": 0.01},
        "diagnostics": {"verdict": "ok"},
        "sampler": {"name": "sgld", "exactness": "exact as h → 0"},
    }
    (table,) = tables(record(experts__cola=entry(step)), SECTIONS[8])
    shown = dict(zip(enumerate(table.columns), row(table, "CoLA"), strict=True))
    assert shown[2, "n"] == "1,043"
    assert shown[5, "MCC of the baseline"] == "0.2000"
    assert shown[6, "of the ensemble"] == "0.2500"


def test_figures_that_later_studies_have_are_shown_where_they_are() -> None:
    old, new = gate(0.9), gate(0.9)
    new["figures"]["gate"]["gate_entropy"] = 0.05
    new["figures"]["abstention"]["area_of_oracle"] = 0.02
    heads = ["Entropy of the weights", "Area at best"]
    both = tables(record(gate__token=entry(new), gate__layer=entry(old)), SECTIONS[7])[2]
    assert both.columns[-2:] == heads
    assert row(both, "per token")[-2:] == ["0.0500", "0.0200"]
    assert row(both, "per layer")[-2:] == ["not available"] * 2
    without = tables(record(gate__layer=entry(old)), SECTIONS[7])[2]
    assert not {*heads} & {*without.columns}
