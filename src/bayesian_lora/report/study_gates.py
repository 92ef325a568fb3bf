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
    NO_MCC,
    Figures,
    Record,
    drawn,
    finished,
    has,
    listed,
    measured,
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
        note = f"{_fitted(steps)}. {measured(record)}."
        blocks += [_accuracy_table(steps, "alone", note), _load_table(steps)]
        blocks += [_doubt_table(steps), _abstention(steps)]
    blocks += unfinished(record, "gate", "Gates")
    return Section("Gates: a mixture of LoRA experts", "gates", blocks)


def ensembles(record: Record) -> Section:
    """A gate over posterior ensembles: experts, gate and prediction with their uncertainty."""
    experts = finished(record, "experts")
    steps = {f"over {name}": s for name, s in finished(record, "ensemblegate").items()}
    blocks: list[Block] = []
    if experts:
        blocks.append(_experts_table(experts, measured(record)))
    for name, step in steps.items():
        blocks.append(Text(recovered(name, step, "ensembles"), "answer"))
        if sampled := step["training"].get("posterior"):
            blocks.append(Text(_how_sampled(sampled)))
    if steps:
        blocks += [
            _accuracy_table(steps, "ensembles", f"{_fitted(steps)}. {measured(record)}."),
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


def _fitted(steps: dict[str, Figures]) -> str:
    """What the gates of a table were fitted on, and which of them were not."""
    first = next(iter(steps.values()))
    untrained = [name for name, step in steps.items() if step["training"].get("trained") is False]
    words = drawn(first["sizes"], first.get("recipe"))
    return f"{words}; the gate {listed(untrained)} is not trained" if untrained else words


def _accuracy_table(steps: dict[str, Figures], reference: str, note: str) -> Table:
    every = [own for step in steps.values() for own in step["figures"]["tasks"].values()]
    names = ["nll"]
    if any("mcc" in own["given_task"] for own in every):
        names.append("mcc")
    rows = []
    for name, step in steps.items():
        found = shares(step, reference)
        for task, own in step["figures"]["tasks"].items():
            share, given, alone = found.get(task), own["given_task"], step[reference][task]
            tone = "" if share is None else ("good" if share >= anchors.RECOVERED else "bad")
            rows.append(
                [
                    cell(name),
                    cell(title(task)),
                    cell(own["examples"]),
                    value(own, "joint_accuracy"),
                    value(given, "accuracy"),
                    value(alone, "accuracy"),
                    Cell(f"{share:.1%}", tone=tone) if share is not None else cell(None),
                    value(own, "gate_accuracy"),
                ]
            )
            for figure in names:
                why = NO_MCC if figure == "mcc" else ""
                rows[-1].append(value(own, f"joint_{figure}", reason=why))
                rows[-1] += [value(row, figure, reason=why) for row in (given, alone)]
    alone = "Ensemble alone" if reference == "ensembles" else "Adapter alone"
    columns = ["Gate", "Task", "n", "Without task labels", "Given the true task", alone]
    columns += ["Recovered", "Task found"]
    for figure in names:
        columns += [f"{figure.upper()} {how}" for how in ("without labels", "given task", "alone")]
    return Table(
        "Accuracy and NLL on the mixture of tasks",
        columns,
        rows,
        note="Without task labels a text is right if both its task and its label are: p(task, y | "
        "x) = gate(task | x)·p(y | x, task). Of each task its default split. Recovered: accuracy "
        "without task labels over that alone. MCC without labels: a text sent to another task is "
        f"misread. NLL in nats. {note}",
    )


def _load_table(steps: dict[str, Figures]) -> Table:
    experts = list(
        dict.fromkeys(e for s in steps.values() for e in s["figures"]["experts"]["load"])
    )
    rows = []
    for name, step in steps.items():
        figures = step["figures"]
        own = [(title(t), x["examples"], x["load"]) for t, x in figures["tasks"].items()]
        for where, n, load in (*own, ("all", _seen(step), figures["experts"]["load"])):
            shown = [_load(load.get(expert)) for expert in experts]
            rows.append([cell(name), cell(where), cell(n), *shown])
    return Table(
        "Load of the experts",
        ["Gate", "Texts of", "n", *(f"expert {title(expert)}" for expert in experts)],
        rows,
        note="Mean weight, and in brackets the share of texts on which the expert's is largest.",
    )


def _seen(step: Figures) -> int:
    """Examples of the mixture."""
    return sum(own["examples"] for own in step["figures"]["tasks"].values())


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
                cell(_seen(step)),
                value(gate, "expert_entropy"),
                value(gate, "task_entropy"),
                value(gate, "task_mutual_information"),
                value(doubt, "predictive_entropy"),
                value(doubt, "mutual_information"),
                value(step["figures"]["experts"], "mutual_information"),
                value(step["figures"]["abstention"], "area"),
            ]
        )
    columns = ["Gate", "Members", "n", "Entropy over experts", "Entropy over tasks"]
    columns += ["members disagree on the task", "Predictive entropy", "members disagree"]
    columns += ["Expert and prediction", "Area under risk–coverage"]
    later = (("gate", "gate_entropy", "Entropy of the weights"),)
    later += (("abstention", "area_of_oracle", "Area at best"),)
    for group, figure, head in later:
        found = [step["figures"][group] for step in steps.values()]
        if has(found, figure):
            columns.append(head)
            for row, figures in zip(rows, found, strict=True):
                row.append(value(figures, figure))
    return Table(
        "Uncertainty of gate and prediction",
        columns,
        rows,
        note=f"{NATS}. Over experts: of each text's mean weights over layers and tokens. Members "
        "disagree: mutual information between member and task, or member and prediction. Expert "
        "and prediction: mutual information between them.",
    )


def _abstention(steps: dict[str, Figures]) -> Picture:
    curves = {name: step["figures"]["abstention"] for name, step in steps.items()}

    def draw(axes: Any) -> None:
        for name, curve in curves.items():
            axes.plot(curve["coverage"], curve["accuracy"], label=name)
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


def _experts_table(experts: dict[str, Figures], seen: str) -> Table:
    rows = []
    for task, step in experts.items():
        base, own = step["map"], step["ensemble"]
        mcc = base.get("mcc", {})
        rows.append(
            [
                cell(title(task)),
                cell(own["k"]),
                cell(step["n"]),
                value(base["accuracy"], "mean"),
                value(own, "accuracy"),
                value(mcc, "mean", reason=mcc.get("reason") or NO_MCC),
                value(own, "mcc", reason=NO_MCC),
                value(base["nll"], "mean"),
                value(own, "nll"),
                value(step["uncertainty"], "mutual_information"),
                _verdict(step["diagnostics"]),
            ]
        )
    columns = ["Task", "Members", "n", "Accuracy of the baseline", "of the ensemble"]
    columns += ["MCC of the baseline", "of the ensemble"]
    columns += ["NLL of the baseline", "of the ensemble", "Mutual information", "Chains"]
    sampler = next(iter(experts.values()))["sampler"]
    return Table(
        "Posterior ensembles from the baselines",
        columns,
        rows,
        note=f"Sampler {sampler['name']}: {sampler['exactness']}. NLL in nats. {NATS}. {seen}.",
    )


def _verdict(diagnostics: Figures) -> Cell:
    words, reason = diagnostics["verdict"], diagnostics.get("reason") or ""
    return cell(None, reason=reason) if words == MISSING else cell(words)


def _how_sampled(facts: Figures) -> str:
    return (
        f"The gate's own parameters were sampled after their fit: {facts['sampler']}, "
        f"{facts['steps']} steps of size {facts['step_size']:g} ({facts['exactness']})."
    )
