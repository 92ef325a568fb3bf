"""The observations' sections on gates, over adapters and over posterior ensembles."""

from typing import Any

from bayesian_lora.report import anchors
from bayesian_lora.report.page import (
    MISSING,
    Block,
    Cell,
    Picture,
    Section,
    Table,
    Text,
    cell,
    plot,
)
from bayesian_lora.report.record import (
    Figures,
    Record,
    finished,
    listed,
    title,
    unfinished,
    value,
)

NATS = "Entropies and mutual information are in nats"


def gates(record: Record) -> Section:
    """Gates over single adapters: right without task labels, sent where, how sure."""
    steps = {_name(kind): step for kind, step in finished(record, "gate").items()}
    blocks: list[Block] = [Text(recovered(name, step), "answer") for name, step in steps.items()]
    if steps:
        blocks += [_accuracy_table(steps, "alone", "Adapter alone"), _load_table(steps)]
        blocks += [_doubt_table(steps), _abstention(steps)]
    blocks += unfinished(record, "gate", "Gates")
    return Section("Gates: a mixture of LoRA experts", "gates", blocks)


def ensembles(record: Record) -> Section:
    """A gate over posterior ensembles: experts, gate and prediction with their uncertainty."""
    experts = finished(record, "experts")
    steps = {f"over {name}": s for name, s in finished(record, "ensemblegate").items()}
    blocks: list[Block] = []
    if experts:
        blocks.append(_experts_table(experts))
    for name, step in steps.items():
        blocks.append(Text(recovered(name, step, "ensembles"), "answer"))
        if sampled := step["training"].get("posterior"):
            blocks.append(Text(_how_sampled(sampled)))
    if steps:
        blocks += [
            _accuracy_table(steps, "ensembles", "Ensemble alone"),
            _load_table(steps),
            _doubt_table(steps),
            _abstention(steps | _same_kind(record, steps)),
        ]
    for kind, what in (("experts", "Posterior ensembles"), ("ensemblegate", "Their gate")):
        blocks += unfinished(record, kind, what)
    return Section("Gates over posterior ensembles", "ensembles", blocks)


def _name(kind: str) -> str:
    plain = kind.removesuffix("_unfrozen")
    return f"per {plain}" + (", adapters trained too" if plain != kind else "")


def _same_kind(record: Record, steps: dict[str, Figures]) -> dict[str, Figures]:
    """The gates over single adapters that those over ensembles are to be held against."""
    kinds = {step["options"]["kind"] for step in steps.values()}
    single = finished(record, "gate").items()
    return {f"{_name(kind)}, single adapters": s for kind, s in single if kind in kinds}


def shares(step: Figures, reference: str = "alone") -> dict[str, float]:
    """Task → accuracy without task labels over that of the task's adapter (or ensemble) alone."""
    return {
        task: own["joint_accuracy"] / step[reference][task]["accuracy"]
        for task, own in step["figures"]["tasks"].items()
        if step[reference][task].get("accuracy")
    }


def recovered(name: str, step: Figures, reference: str = "alone") -> str:
    """Whether a gate reaches the target on every task."""
    found = shares(step, reference)
    if not found:
        return f"Gate {name}: the share recovered is not known."
    least = min(found, key=lambda task: found[task])
    met = "met" if found[least] >= anchors.RECOVERED else "not met"
    each = listed(f"{share:.1%} on {title(task)}" for task, share in found.items())
    sure = step["figures"]["mixture"]["gate_accuracy"]
    return (
        f"Gate {name}: without task labels it recovers {each} of the accuracy of "
        f"{'the ensemble' if reference == 'ensembles' else 'the single adapter'}; the target, at "
        f"least {anchors.RECOVERED:.0%} on each, is {met}. It names the task of {sure:.1%} of the "
        "mixture."
    )


def _accuracy_table(steps: dict[str, Figures], reference: str, alone: str) -> Table:
    rows = []
    for name, step in steps.items():
        found = shares(step, reference)
        for task, own in step["figures"]["tasks"].items():
            share = found.get(task)
            tone = "" if share is None else ("good" if share >= anchors.RECOVERED else "bad")
            rows.append(
                [
                    cell(name),
                    cell(title(task)),
                    value(own, "joint_accuracy"),
                    value(own["given_task"], "accuracy"),
                    value(step[reference][task], "accuracy"),
                    Cell(f"{share:.1%}", tone=tone) if share is not None else cell(None),
                    value(own, "gate_accuracy"),
                    value(own, "joint_nll"),
                    value(own["given_task"], "nll"),
                    value(step[reference][task], "nll"),
                ]
            )
    columns = ["Gate", "Task", "Without task labels", "Given the true task", alone, "Recovered"]
    first = next(iter(steps.values()))
    sizes = listed(f"{n:,} of {title(t)}" for t, n in first["sizes"].items())
    seen = first["figures"]["tasks"].items()
    evaluated = listed(f"{own['examples']:,} of {title(t)}" for t, own in seen)
    return Table(
        "Accuracy and NLL on the mixture of tasks",
        [*columns, "Task found", "NLL without labels", "NLL given the task", "NLL alone"],
        rows,
        note="Without task labels a text is right if both its task and its label are: p(task, y | "
        f"x) = gate(task | x)·p(y | x, task). Trained on {sizes}, measured on {evaluated}.",
    )


def _load_table(steps: dict[str, Figures]) -> Table:
    experts = list(
        dict.fromkeys(e for s in steps.values() for e in s["figures"]["experts"]["load"])
    )
    rows = []
    for name, step in steps.items():
        figures = step["figures"]
        groups = {title(task): own["load"] for task, own in figures["tasks"].items()}
        for where, load in (groups | {"all": figures["experts"]["load"]}).items():
            known = [load.get(expert) for expert in experts]
            shown = [_load(row) for row in known]
            rows.append([cell(name), cell(where), *shown])
    return Table(
        "Load of the experts",
        ["Gate", "Texts of", *(f"expert {title(expert)}" for expert in experts)],
        rows,
        note="Mean weight, and in brackets the share of texts on which the expert's is largest.",
    )


def _load(row: Figures | None) -> Cell:
    if row is None:
        return cell(None, reason="the gate has no such expert")
    return Cell(f"{row['weight']:.3f} ({row['top']:.0%})")


def _doubt_table(steps: dict[str, Figures]) -> Table:
    rows = []
    for name, step in steps.items():
        gate, doubt = step["figures"]["gate"], step["figures"]["uncertainty"]
        rows.append(
            [
                cell(name),
                cell(step["members"]),
                value(gate, "expert_entropy"),
                value(gate, "task_entropy"),
                value(gate, "task_mutual_information"),
                value(doubt, "predictive_entropy"),
                value(doubt, "mutual_information"),
                value(step["figures"]["experts"], "mutual_information"),
                value(step["figures"]["abstention"], "area"),
            ]
        )
    columns = ["Gate", "Members", "Entropy over experts", "Entropy over tasks"]
    columns += ["members disagree on the task", "Predictive entropy", "members disagree"]
    return Table(
        "Uncertainty of gate and prediction",
        [*columns, "Expert and prediction", "Area under risk–coverage"],
        rows,
        note=f"{NATS}. Members disagree: mutual information between member and task, or member and "
        "prediction. Expert and prediction: mutual information between them.",
    )


def _abstention(steps: dict[str, Figures]) -> Picture:
    curves = {name: step["figures"]["abstention"] for name, step in steps.items()}

    def draw(axes: Any) -> None:
        for name, curve in curves.items():
            axes.plot(curve["coverage"], curve["accuracy"], marker="o", ms=3, label=name)
        axes.set_xlabel("share of texts answered, the surest first")
        axes.set_ylabel("accuracy, task and label")
        axes.legend(fontsize=8)

    words = "; ".join(
        f"{name}: {c['accuracy'][0]:.3f} at {c['coverage'][0]:.0%}, {c['accuracy'][-1]:.3f} at all"
        for name, c in curves.items()
    )
    return plot(
        draw,
        text=f"Accuracy against coverage. {words}",
        caption="Abstention: accuracy where only the surest texts are answered, by predictive "
        "entropy",
        size=(6.4, 3.6),
    )


def _experts_table(experts: dict[str, Figures]) -> Table:
    rows = []
    for task, step in experts.items():
        rows.append(
            [
                cell(title(task)),
                cell(step["ensemble"]["k"]),
                value(step["map"]["accuracy"], "mean"),
                value(step["ensemble"], "accuracy"),
                value(step["map"]["nll"], "mean"),
                value(step["ensemble"], "nll"),
                value(step["uncertainty"], "mutual_information"),
                _verdict(step["diagnostics"]),
            ]
        )
    columns = ["Task", "Members", "Accuracy of the baseline", "of the ensemble"]
    columns += ["NLL of the baseline", "of the ensemble", "Mutual information", "Chains"]
    sampler = next(iter(experts.values()))["sampler"]
    return Table(
        "Posterior ensembles from the baselines",
        columns,
        rows,
        note=f"Sampler {sampler['name']}: {sampler['exactness']}. {NATS}.",
    )


def _verdict(diagnostics: Figures) -> Cell:
    words, reason = diagnostics["verdict"], diagnostics.get("reason") or ""
    return cell(None, reason=reason) if words == MISSING else cell(words)


def _how_sampled(facts: Figures) -> str:
    return (
        f"The gate's own parameters were sampled after their fit: {facts['sampler']}, "
        f"{facts['steps']} steps of size {facts['step_size']:g} ({facts['exactness']})."
    )
