"""The observations: words follow the figures, and what is missing says why."""

import copy
import math
from typing import Any

import pytest

from bayesian_lora.report import anchors, heatmaps
from bayesian_lora.report import page as page_module
from bayesian_lora.report.observations import observations
from bayesian_lora.report.page import Code, Missing, Section, Table, Text, render

Figures = dict[str, Any]
VERSIONS = {"python": "3", "torch": "2"}
SECTIONS = ["In short", "Baselines: one adapter a task", "Stacked without further training"]
SECTIONS += ["Stacks trained further", "Similarity of the single adapters"]
SECTIONS += ["Drift of the trained stacks from their parts", "Sequential growth"]
SECTIONS += ["Gates: a mixture of LoRA experts", "Gates over posterior ensembles"]
SECTIONS += ["Rank against performance", "How it was made"]


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take their time; the last test draws them."""
    monkeypatch.setattr(page_module, "_svg", lambda *_: b"<svg/>")
    monkeypatch.setattr(heatmaps, "pictures", lambda _: {"a-b.png": b"png"})


def split(accuracy: float, nll: float = 0.4, **more: float) -> Figures:
    return {"validation": {"n": 1000, "accuracy": accuracy, "nll": nll, **more}}


def entry(figures: Figures | None, **changes: Any) -> Figures:
    done = {"title": "a step", "status": "finished", "seconds": 2.0, "error": None}
    return {**done, "figures": figures, **changes}


def record(**steps: Figures) -> Figures:
    named = {name.replace("__", "-"): found for name, found in steps.items()}
    config = {"tasks": {"sst2": "a", "cola": "b"}, "seed": 3}
    made = {"command": "bayesian-lora study s.yaml", "versions": VERSIONS, "git_commit": None}
    return {**made, "config": config, "steps": named}


def section(given: Figures, title: str) -> Section:
    return next(s for s in observations(given).sections if s.title == title)


def answers(given: Figures, title: str) -> list[str]:
    return [b.text for b in section(given, title).blocks if isinstance(b, Text) and b.tone]


def tables(given: Figures, title: str) -> list[Table]:
    return [b for b in section(given, title).blocks if isinstance(b, Table)]


def row(table: Table, *start: str) -> list[str]:
    texts = [[cell.text for cell in cells] for cells in table.rows]
    return next(found for found in texts if tuple(found[: len(start)]) == start)


def baseline() -> Figures:
    history = [
        {"epoch": e, "lr-Adam": 0.1, "train/loss": 0.5, "train/acc": 0.7,
         "trainer/global_step": 10 * (e + 1), "val/loss": 0.6, "val/acc": 0.6}
        for e in range(2)
    ]  # fmt: skip
    return {
        "model": "minilm", "rank": 1, "alpha": 8.0, "modules": ["key", "query", "value"],
        "parameters": 1234, "title": "GLUE", "sizes": {"train": 90, "validation": 10,
        "evaluation": {"validation": 1000}}, "splits": split(0.8, mcc=0.5),
        "logged": {"train/loss": 0.31, "train/acc": 0.87, "val/loss": 0.33, "val/acc": 0.8},
        "history": history, "seconds": 5.0,
    }  # fmt: skip


def stack(lost: float) -> Figures:
    def way(title: str, less: float) -> Figures:
        figures = {"sst2": split(0.85 - less), "cola": split(0.8 - less, mcc=0.3)}
        return {"title": title, "note": "", "rank": 2, "weights": {}, "figures": figures}

    ways = {"exact": way("stacked exactly", lost), "original": way("at the original's", 2 * lost)}
    alone = {"sst2": split(0.85), "cola": split(0.8, mcc=0.4)}
    return {"alone": alone, "ranks": {"sst2": 1, "cola": 1}, "ways": ways}


def further(**accuracies: tuple[float, float]) -> Figures:
    history = baseline()["history"]
    return {
        "alone": {"sst2": split(0.85), "cola": split(0.80)},
        "before": {"sst2": split(0.84), "cola": split(0.79)},
        "sizes": {"sst2": 90, "cola": 90},
        "recipe": {"epochs": 2, "lr": 1e-3},
        "variants": {
            name: {"what": "all", "figures": {"sst2": split(a), "cola": split(b)},
                   "history": history, "tasks": ["sst2"]}
            for name, (a, b) in accuracies.items()
        },
    }  # fmt: skip


def gate(share: float) -> Figures:
    load = {"sst2": {"weight": 0.6, "top": 0.7}, "cola": {"weight": 0.4, "top": 0.3}}
    own = {"examples": 100, "gate_accuracy": 0.9, "joint_nll": 0.5, "load": load,
           "given_task": {"accuracy": 0.79, "nll": 0.4}}  # fmt: skip
    tasks = {"sst2": own | {"joint_accuracy": 0.8}, "cola": own | {"joint_accuracy": 0.8 * share}}
    reason = {"task_mutual_information": None, "task_mutual_information_reason": "one member"}
    return {
        "options": {"kind": "sequence"}, "members": 1, "sizes": {"sst2": 90, "cola": 90},
        "alone": {"sst2": {"accuracy": 0.8, "nll": 0.4}, "cola": {"accuracy": 0.8, "nll": 0.4}},
        "training": {},
        "figures": {
            "tasks": tasks, "mixture": {"gate_accuracy": 0.95},
            "experts": {"load": load, "mutual_information": 0.2},
            "gate": {"expert_entropy": 0.1, "task_entropy": 0.2, **reason},
            "uncertainty": {"predictive_entropy": 0.3, "mutual_information": 0.01},
            "abstention": {"coverage": [0.5, 1.0], "accuracy": [0.9, 0.8], "area": 0.1},
        },
    }  # fmt: skip


def rank(number: int, accuracy: float, sd: float = 0.001) -> Figures:
    single = {"accuracy": {"mean": accuracy, "sd": sd}, "nll": {"mean": 0.4, "sd": 0.01}}
    return {
        "task": "sst2", "rank": number, "parameters": 10 * number, "fits": 4, "single": single,
        "ensemble": {"nll": 0.39}, "seconds": 1.0, "n": 1000, "split": "validation",
        "sizes": {"train": 90},
    }  # fmt: skip


def test_every_section_is_there_and_says_why_it_is_empty() -> None:
    page = observations(record())
    assert [s.title for s in page.sections] == SECTIONS
    for found in page.sections[1:-1]:
        assert found.blocks
        assert all(isinstance(block, Missing) for block in found.blocks), found.title
    failed = record(stack__both=entry(None, status="failed", error="no such base"))
    block = section(failed, SECTIONS[2]).blocks[0]
    assert isinstance(block, Missing)
    assert (block.what, block.reason) == ("a step", "no such base")
    assert "no such base" in render(observations(failed))
    pending = section(record(rank__1=entry(None, status="pending")), SECTIONS[9]).blocks[0]
    assert isinstance(pending, Missing)
    assert pending.reason == "this step has not been made yet"


def test_the_original_s_tables_are_filled_in_beside_its_figures() -> None:
    given = record(baseline__sst2=entry(baseline()))
    found = next(t for t in tables(given, SECTIONS[1]) if t.caption.startswith("SST-2"))
    assert [cells[0].text for cells in found.rows] == list(anchors.BASELINE["sst2"])
    assert row(found, "val/acc") == ["val/acc", "0.8000", "0.8463"]
    code = next(b for b in section(given, SECTIONS[1]).blocks if isinstance(b, Code))
    assert code.text == f"sst2_baseline = {baseline()['logged']!r}"


@pytest.mark.parametrize(("lost", "met"), [(0.03, "met"), (0.06, "not met"), (-0.01, "met")])
def test_stacking_is_held_against_half_of_what_the_original_lost(lost: float, met: str) -> None:
    given = record(stack__both=entry(stack(lost)))
    words = answers(given, SECTIONS[2])
    assert len(words) == 2
    assert all(text.endswith(f"is {met}.") for text in words)
    assert f"{-lost:+.3f}" in words[0]
    aims = tables(given, "In short")[0]
    assert [cells[-1].text for cells in aims.rows] == [{"met": "yes", "not met": "no"}[met]] * 2
    table = tables(given, SECTIONS[2])[0]
    shown = row(table, "SST-2", "stacked exactly")
    assert shown[3:5] == [f"{0.85 - lost:.4f}", f"{-lost:+.4f}"]
    assert row(table, "CoLA", "the adapter alone")[5] == "0.4000"


@pytest.mark.parametrize(
    ("variants", "reached", "best"),
    [
        ({"a": (0.86, 0.70), "b": (0.84, 0.79)}, "No variant reaches", "best is b (-0.010)"),
        ({"a": (0.86, 0.70), "b": (0.86, 0.81)}, "every one of them: b.", "best is b (+0.010)"),
    ],
)  # fmt: skip
def test_better_on_both_is_answered_from_the_figures(
    variants: dict[str, tuple[float, float]], reached: str, best: str
) -> None:
    (words,) = answers(record(further__both=entry(further(**variants))), SECTIONS[3])
    assert "Better generalisability on SST-2 and CoLA?" in words
    assert reached in words
    assert best in words


def test_only_changes_beyond_two_standard_errors_are_marked() -> None:
    given = record(further__both=entry(further(a=(0.86, 0.70))))
    table = tables(given, SECTIONS[3])[0]
    cells = next(cells for cells in table.rows if cells[0].text == "a")
    assert [(c.text, c.tone) for c in (cells[3], cells[7])] == [("+0.0100", ""), ("-0.1000", "bad")]
    summary = tables(given, SECTIONS[3])[1]
    assert row(summary, "trainer/global_step")[1] == "20"


@pytest.mark.parametrize(("share", "met"), [(0.96, "met"), (0.94, "not met")])
def test_gates_are_held_against_their_target(share: float, met: str) -> None:
    given = record(gate__sequence=entry(gate(share)))
    (words,) = answers(given, SECTIONS[7])
    assert f"{share:.1%} on CoLA" in words
    assert f"is {met}." in words
    table = tables(given, SECTIONS[7])[0]
    cells = next(cells for cells in table.rows if cells[1].text == "CoLA")
    assert (cells[5].text, cells[5].tone) == (f"{share:.1%}", "good" if met == "met" else "bad")
    doubt = tables(given, SECTIONS[7])[2]
    assert doubt.missing == ["one member"]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([rank(1, 0.80), rank(4, 0.83)], "+0.030 against rank 1: more than two standard errors"),
        ([rank(1, 0.80, 0.1), rank(4, 0.83, 0.1)], "within two standard errors"),
        ([rank(1, 0.80), rank(4, 0.79)], "no rank is better than rank 1 (0.800)"),
    ],
)
def test_rank_against_performance(steps: list[Figures], words: str) -> None:
    named = {f"rank__{step['rank']}": entry(step) for step in reversed(steps)}
    given = record(**named)
    (text,) = answers(given, SECTIONS[9])
    assert words in text
    assert [cells[0].text for cells in tables(given, SECTIONS[9])[0].rows] == ["1", "4"]


def grown(identical: bool, largest: float) -> Figures:
    def task(accuracy: float, later: Figures) -> Figures:
        return {"columns": [0, 1], "parameters": {"columns": 5, "head": 2}, "angles": [],
                "after": split(accuracy), "later": later, "transfer": None,
                "transfer_reason": "the first task has no earlier columns"}  # fmt: skip

    now = {"identical": identical, "largest_difference": largest,
           "masked": {"accuracy": 0.8, "nll": 0.4},
           "unmasked": {"accuracy": 0.7, "nll": 0.6}}  # fmt: skip
    tasks = {"sst2": task(0.8, {"cola": now}), "cola": task(0.75, {})}
    return {"order": ["sst2", "cola"], "tasks": tasks}


@pytest.mark.parametrize(
    ("identical", "largest", "words", "reached"),
    [(True, 0.0, "bit for bit", "yes"), (False, 1e-3, "moved by more than 0.001", "no")],
)
def test_what_growth_leaves_as_it_was(
    identical: bool, largest: float, words: str, reached: str
) -> None:
    given = record(sequential=entry(grown(identical, largest)))
    (text,) = answers(given, SECTIONS[6])
    assert words in text
    assert [cells[-1].text for cells in tables(given, "In short")[0].rows] == [reached]
    forgotten = row(tables(given, SECTIONS[6])[1], "SST-2", "CoLA")
    assert forgotten[4:] == ["0.8000", "0.7000", "-0.1000", "+0.2000"]


@pytest.mark.parametrize(
    ("cosine", "verdict"), [(0.015, "no more than chance"), (-0.025, "more than chance")]
)
def test_likeness_is_held_against_chance(cosine: float, verdict: str) -> None:
    chance = {"mean": 0.0, "sd": 0.01}
    whole: Figures = {"cosine": cosine, "cosine_mean": cosine}
    for side in ("left", "right"):
        whole |= {f"phi_{side}": 0.1, f"baseline_{side}": 0.03, f"angle_{side}": math.pi / 3}
        whole |= {f"geodesic_{side}": 1.0, f"projection_{side}": 0.9}
    names = ("cosine", "phi_left", "phi_right", "geodesic_left", "geodesic_right")
    whole["control"] = dict.fromkeys(names, chance)
    pair = {"first": "sst2", "second": "cola", "whole": whole,
            "modules": [{"factor_cosines": {"A": 0.5, "B": None}}]}  # fmt: skip
    labels = dict.fromkeys(
        ("cosine", "control", "factor_cosines", "phi", "baseline", "geodesic"), "x"
    )
    found = {"pairs": [pair], "labels": labels, "settings": {"repeats": 10}, "adapters": []}
    given = record(similarity=entry({"comparison": found}))
    (text,) = answers(given, SECTIONS[4])
    assert text.endswith(f": {verdict}.")
    cosines, subspaces = tables(given, SECTIONS[4])
    assert row(cosines, "SST-2 – CoLA")[-2:] == ["0.5000", "not available"]
    assert row(subspaces, "SST-2 – CoLA", "left (output)")[5] == "60.0°"


def test_figures_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    given = record(
        baseline__sst2=entry(baseline()),
        stack__both=entry(stack(0.03)),
        further__both=entry(further(a=(0.86, 0.7))),
        gate__sequence=entry(gate(0.9)),
        rank__1=entry(rank(1, 0.8)),
    )
    before = copy.deepcopy(given)
    assert render(observations(given)).count("data:image/svg+xml") == 8  # four, for two grounds
    assert given == before
