"""Records of studies, made up, and what their page shows: for the report's tests."""

from typing import Any

from bayesian_lora.data.glue_datasets import TASKS
from bayesian_lora.report.observations import observations
from bayesian_lora.report.page import Section, Table, Text

Figures = dict[str, Any]
VERSIONS = {"python": "3", "torch": "2"}
SECTIONS = ["In short", "Baselines: one adapter a task", "Stacked without further training"]
SECTIONS += ["Stacks trained further", "Similarity of the single adapters"]
SECTIONS += ["Drift of the trained stacks from their parts", "Sequential growth"]
SECTIONS += ["Gates: a mixture of LoRA experts", "Gates over posterior ensembles"]
SECTIONS += ["Rank against performance", "How it was made"]


def split(accuracy: float, nll: float = 0.4, **more: float) -> Figures:
    return {"validation": {"n": 1000, "accuracy": accuracy, "nll": nll, **more}}


def entry(figures: Figures | None, **changes: Any) -> Figures:
    done = {"title": "a step", "status": "finished", "seconds": 2.0, "error": None}
    return {**done, "figures": figures, **changes}


def record(**steps: Figures) -> Figures:
    """Of these steps, ``kind__name``."""
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


def baselines(sst2: str = "sst2", cola: str = "cola") -> Figures:
    """Finished baselines of the tasks sst2 and cola, on these data sets."""
    return {
        "baseline__sst2": entry(baseline(sst2)),
        "baseline__cola": entry(baseline(cola)),
    }


def baseline(data_set: str = "sst2") -> Figures:
    history = [
        {"epoch": e, "lr-Adam": 0.1, "train/loss": 0.5, "train/acc": 0.7,
         "trainer/global_step": 10 * (e + 1), "val/loss": 0.6, "val/acc": 0.6}
        for e in range(2)
    ]  # fmt: skip
    return {
        "model": "minilm", "rank": 1, "alpha": 8.0, "modules": ["key", "query", "value"],
        "parameters": 1234, "title": TASKS[data_set].title, "sizes": {"train": 90, "validation": 10,
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
        "recipe": {"epochs": 2, "lr": 1e-3, "steps_per_epoch": 120, "batch_size": 32},
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
        "training": {"trained": True},
        "recipe": {"epochs": 3, "steps_per_epoch": None, "batch_size": 30},
        "figures": {
            "tasks": tasks, "mixture": {"gate_accuracy": 0.95},
            "experts": {"load": load, "mutual_information": 0.2},
            "gate": {"expert_entropy": 0.1, "task_entropy": 0.2, **reason},
            "uncertainty": {"predictive_entropy": 0.3, "mutual_information": 0.01},
            "abstention": {"coverage": [0.5, 1.0], "accuracy": [0.9, 0.8], "area": 0.1},
        },
    }  # fmt: skip


def rank(number: int, accuracy: float, sd: float = 0.001, nll: float = 0.4) -> Figures:
    single = {"accuracy": {"mean": accuracy, "sd": sd}, "nll": {"mean": nll, "sd": sd}}
    return {
        "task": "sst2", "rank": number, "parameters": 10 * number, "fits": 4, "single": single,
        "ensemble": {"nll": 0.39}, "seconds": 1.0, "n": 1000, "split": "validation",
        "sizes": {"train": 90},
    }  # fmt: skip


def grown(identical: bool, largest: float) -> Figures:
    def task(accuracy: float, later: Figures) -> Figures:
        return {"columns": [0, 1], "parameters": {"columns": 5, "head": 2}, "angles": [],
                "after": split(accuracy), "later": later, "transfer": None,
                "transfer_reason": "the first task has no earlier columns"}  # fmt: skip

    now = {"identical": identical, "largest_difference": largest,
           "masked": {"n": 1000, "accuracy": 0.8, "nll": 0.4},
           "unmasked": {"accuracy": 0.7, "nll": 0.6}}  # fmt: skip
    tasks = {"sst2": task(0.8, {"cola": now}), "cola": task(0.75, {})}
    return {"order": ["sst2", "cola"], "tasks": tasks}


def likeness(cosine: float) -> Figures:
    """A pair of adapters, as `composition.similarity` compares two."""
    chance = {"mean": 0.0, "sd": 0.01}
    whole: Figures = {"cosine": cosine, "cosine_mean": cosine, "relative_change": 0.3}
    for side in ("left", "right"):
        whole |= {f"phi_{side}": 0.1, f"baseline_{side}": 0.03, f"angle_{side}": 1.0}
        whole |= {f"geodesic_{side}": 1.0, f"projection_{side}": 0.9}
        whole[f"grids_{side}"] = {n: [[0.1]] for n in ("phi", "baseline", "control_mean")}
    sides = ("phi_left", "phi_right", "geodesic_left", "geodesic_right")
    control: Figures = dict.fromkeys(("cosine", *sides), chance)
    whole["control"] = control | {"relative_change": {"mean": 1.41, "sd": 0.02}}
    return whole | {"modules": 1}
