"""`bayesian-lora eval RUN --ood NAME_OR_PATH`: what `eval` does when it is given a foreign set."""

from pathlib import Path

from bayesian_lora.errors import InputError

HELP = (
    "A set the run was not trained on, to be told from the split: uci, another task (ag_news, "
    "mnli:mismatched), a split of the own (shifted), or a .csv, .tsv, .jsonl, .json or .parquet "
    "file."
)
EXAMPLES = (
    "bayesian-lora eval runs/sst2 --ood uci\n\n"
    "bayesian-lora eval runs/demo --ood shifted\n\n"
    "bayesian-lora eval runs/sst2 --ood reviews.csv"
)
NOT_WITH = {"k": "--k", "single": "--single", "tolerance": "--tolerance"}


def evaluate_ood(
    root: Path,
    name: str,
    *,
    split: str | None,
    chosen: dict[str, object],
    data_dir: str | None,
    device: str | None,
) -> None:
    """Scores of a run on the set `name`, told from a split of its task.

    Args:
        root: the run's folder.
        name: of the set, or a file.
        split: of the task; None is the default one.
        chosen: what was given of `NOT_WITH`, None or False where nothing was.
        data_dir, device: in place of the run's own.

    Raises:
        InputError: one of `chosen` was given, or as `experiment.ood.evaluate_ood`.
    """
    if not name.strip():
        raise InputError("--ood is empty: give the name of a set or a file, such as --ood uci")
    for key, option in NOT_WITH.items():
        if chosen.get(key) not in (None, False):
            raise InputError(
                f"{option}: --ood {name} takes all members on all inputs, since its scores are "
                f"stored; leave {option} out"
            )
    from bayesian_lora.experiment.ood import evaluate_ood as run

    run(root, name, split=split, data_dir=data_dir, device=device)
