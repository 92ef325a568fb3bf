"""Predictions that an evaluation has stored, read back and checked.

Shapes: K members, N examples, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bayesian_lora.assessment.evaluation import evaluate
from bayesian_lora.errors import InputError
from bayesian_lora.manifest import read_manifest
from bayesian_lora.predict import Predictions
from bayesian_lora.utils.files import read_json, read_npz

SAME = 1e-6
"""Relative: what rounding may change of a figure computed twice of the same arrays."""
ARRAYS = {"logits": "fiu", "labels": "fiu", "weights": "fiu", "example_id": "iu"}
"""What a file of predictions holds, and of which kinds of number."""


def load_predictions(root: str | Path, split: str | None = None) -> Predictions:
    """The members' predictions on a split that the run in `root` has been evaluated on.

    They are those that its figures were computed of: as many members as the run has, as many
    examples as were evaluated, the same NLL. ``true_probs`` is None, it is not stored.

    Args:
        root: the run's folder.
        split: as its `metrics.<split>.json` names it; None is that of `metrics.json`.

    Raises:
        InputError: not evaluated on that split, or the file is damaged, has values that are not
            finite, or belongs to another run, split or number of members.
    """
    root = Path(root)
    figures, split = _figures(root, split)
    path = root / "predictions" / f"{split}.npz"
    outside = figures.get("ood")
    option = f"--ood {outside.get('set', split)}" if outside else f"--split {split}"
    remedy = f"store it anew with 'bayesian-lora eval {root} {option}'"
    if not path.is_file():
        raise InputError(f"{path}: not there; {remedy}")
    arrays = read_npz(path)
    p = _predictions(path, arrays, remedy)
    provenance, records, _ = read_manifest(root)
    regression = provenance.task["likelihood"] == "gaussian"
    named = str(arrays["split"]) if "split" in arrays else split
    if named != split:
        raise InputError(f"{path}: holds predictions of split {named!r}, not {split!r}; {remedy}")
    if p.num_members != len(records):
        raise InputError(
            f"{path}: predictions of {p.num_members} members, the run has {len(records)}; {remedy}"
        )
    if regression != (p.noise_std is not None):
        what = "without" if regression else "with"
        raise InputError(
            f"{path}: {what} noise_std, the task's likelihood is {provenance.task['likelihood']}; "
            f"{remedy}"
        )
    if len(p) != figures["n"]:
        raise InputError(
            f"{path}: predictions on {len(p)} examples, {figures['n']} of split {split} were "
            f"evaluated; {remedy}"
        )
    _check_figures(path, p, regression, figures.get("ensemble"), remedy)
    return p


def _figures(root: Path, split: str | None) -> tuple[dict[str, Any], str]:
    """The metrics file of a split, and the split's name."""
    usual = root / "metrics.json"
    path = usual
    if not usual.is_file():
        raise InputError(f"{usual}: not there; evaluate first with 'bayesian-lora eval {root}'")
    figures = read_json(usual, "metrics")
    if split is not None and figures.get("split") != split:
        path = root / f"metrics.{split}.json"
        if not path.is_file():
            raise InputError(
                f"{path}: not there, the run was not evaluated on {split!r}; evaluate first with "
                f"'bayesian-lora eval {root} --split {split}'"
            )
        figures = read_json(path, "metrics")
    name = split or figures.get("split")
    if type(figures.get("n")) is not int or not isinstance(name, str):
        raise InputError(
            f"{path}: damaged, its n or split is missing; evaluate again with "
            f"'bayesian-lora eval {root}'"
        )
    return figures, name


def _predictions(path: Path, arrays: dict[str, np.ndarray], remedy: str) -> Predictions:
    """The arrays as `Predictions`; each of its kind and shape, all finite."""
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise InputError(f"{path}: damaged, it has no {missing[0]}; {remedy}")
    kinds = {**ARRAYS, **({"noise_std": "f"} if "noise_std" in arrays else {})}
    for name, kind in kinds.items():
        if (found := arrays[name].dtype).kind not in kind:
            raise InputError(f"{path}: damaged, {name} is of type {found}; {remedy}")
    if arrays["logits"].ndim != 3 or arrays["logits"].size == 0:
        shape = arrays["logits"].shape
        raise InputError(f"{path}: damaged, logits {shape} are not (K, N, C); {remedy}")
    k, n, _ = arrays["logits"].shape
    shapes = {"labels": (n,), "weights": (k,), "example_id": (n,), "noise_std": (k,)}
    for name in kinds.keys() - {"logits"}:
        if (shape := arrays[name].shape) != shapes[name]:
            raise InputError(
                f"{path}: damaged, {name} {shape} does not fit {k} members and {n} examples; "
                f"{remedy}"
            )
    for name in kinds:
        if not (ok := np.isfinite(arrays[name])).all():
            place = ", ".join(str(i) for i in np.argwhere(~ok)[0])
            raise InputError(
                f"{path}: {int((~ok).sum())} of {ok.size} values of {name} are NaN or infinite, "
                f"the first at ({place}); {remedy}"
            )
    _check_values(path, arrays, remedy)
    optional = arrays.get("noise_std")
    return Predictions(*(arrays[name] for name in ARRAYS), noise_std=optional)


def _check_values(path: Path, arrays: dict[str, np.ndarray], remedy: str) -> None:
    weights, ids = arrays["weights"], arrays["example_id"]
    if (weights < 0).any() or not np.isclose(weights.sum(), 1.0, rtol=0, atol=SAME):
        raise InputError(
            f"{path}: damaged, weights from {weights.min():g}, sum {weights.sum():g}: none may be "
            f"negative and their sum is 1; {remedy}"
        )
    if len(np.unique(ids)) < len(ids):
        raise InputError(f"{path}: damaged, an example_id occurs twice; {remedy}")
    noise = arrays.get("noise_std")
    if noise is not None and (noise <= 0).any():
        raise InputError(f"{path}: damaged, noise_std {noise.min():g} is not above 0; {remedy}")


def _check_figures(path: Path, p: Predictions, regression: bool, figures: Any, remedy: str) -> None:
    """The NLL that was reported is that of these arrays; a set without labels has none."""
    reported = figures.get("nll") if isinstance(figures, dict) else None
    if reported is None:
        return
    try:
        found = evaluate((), regression, p)["nll"]
    except InputError as error:
        raise InputError(f"{path}: damaged, {error}; {remedy}") from error
    if not np.isclose(found, reported, rtol=SAME, atol=SAME):
        raise InputError(
            f"{path}: its NLL is {found:.6g}, {reported:.6g} was reported: predictions of another "
            f"run or split; {remedy}"
        )
