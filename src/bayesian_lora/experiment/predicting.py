"""`bayesian-lora predict`: a run, a saved ensemble or an adapter of either → answers to texts.

What can be known without the model (the task's columns and labels) is found first, so that mistakes
in the input are told before anything large is loaded.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bayesian_lora.abstention import Abstention, RiskThreshold, risk_threshold
from bayesian_lora.assessment.stored import load_predictions
from bayesian_lora.composition.sources import read_source
from bayesian_lora.data.glue_datasets import TASKS
from bayesian_lora.data.text_streams import Wanted
from bayesian_lora.ensemble import Ensemble, load_model
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.building import resolve_device
from bayesian_lora.experiment.resume import load_own_config
from bayesian_lora.experiment.setup import task_of
from bayesian_lora.manifest import MANIFEST, Provenance, read_manifest
from bayesian_lora.member_files import MemberRecord
from bayesian_lora.models.hf_lora import HuggingFaceLora
from bayesian_lora.models.sources import load_pretrained
from bayesian_lora.serving import BESIDE, CLASSES, NUMBERS, Predictor, Service
from bayesian_lora.utils.files import read_json


@dataclass(frozen=True)
class Found:
    """What is to predict, as far as its small files tell.

    root: the folder; provenance: of its members, whose label names are known (those of the registry
    where nothing else tells) or missing; text_columns: of its task, () where nothing tells;
    ensemble: None where the members are still to be read.
    """

    root: Path
    provenance: Provenance
    text_columns: tuple[str, ...]
    ensemble: Ensemble | None = None

    @property
    def regression(self) -> bool:
        return self.provenance.task["likelihood"] == "gaussian"

    def load(self, k: int | None = None) -> Ensemble:
        """The members, or the first k.

        Raises:
            InputError: one is damaged, or fewer are there.
        """
        whole = self.ensemble or Ensemble.load(self.root)
        return whole if k is None else whole.subset(k)


def find(run: str | Path) -> Found:
    """What lies in a folder: a run, a saved ensemble, or a PEFT folder of a run or a stack.

    Raises:
        InputError: none of them (a comparison or a stack says what to name in it), or an adapter
            of which neither task nor base weights are known.
    """
    root = Path(run)
    if (root / "comparison.json").is_file() and not (root / MANIFEST).is_file():
        raise InputError(f"{root}: a comparison; name the folder of one of its cells, in it")
    if not root.is_dir():
        what = "a file" if root.is_file() else "no such folder"
        raise InputError(f"{root}: {what}; name the folder of a run or of a saved ensemble")
    if (root / MANIFEST).is_file():
        provenance, ensemble = read_manifest(root)[0], None
    elif (root / "config.yaml").is_file():
        raise InputError(f"{root}: the run has no samples yet; let it collect some")
    else:
        provenance, ensemble = _adapter(root)
    return Found(root, _named(provenance), _text_columns(root, provenance), ensemble)


def _adapter(root: Path) -> tuple[Provenance, Ensemble]:
    source = read_source(str(root))
    model, task, spec = source.model, source.task, source.spec
    if model is None or task is None or spec is None or model.get("fingerprint") is None:
        raise InputError(
            f"{root}: an adapter of which task, length of texts and base weights are not recorded, "
            "so its labels would be guesses; name a run, a saved ensemble, or a folder in one"
        )
    lora = dataclasses.asdict(spec)
    provenance = Provenance(dict(model), dict(task), lora, dict(source.sampler or {}))
    places = source.places or tuple((k, 0) for k in range(len(source)))
    records = [
        MemberRecord("", chain=chain, draw=draw, step=0, weight=float(weight))
        for (chain, draw), weight in zip(places, source.weights, strict=True)
    ]
    return provenance, Ensemble(provenance, records, source.members)


def _named(provenance: Provenance) -> Provenance:
    """With the label names of the registry's task of that name where none are recorded."""
    known = TASKS.get(provenance.task["name"])
    size = provenance.model["num_labels"]
    names = provenance.task.get("label_names") or ()
    if len(names) != size and known is not None and known.num_labels == size:
        names = known.label_names
    names = list(names) if len(names) == size else []
    return dataclasses.replace(provenance, task={**provenance.task, "label_names": names})


def _text_columns(root: Path, provenance: Provenance) -> tuple[str, ...]:
    if (root / "config.yaml").is_file():
        return task_of(load_own_config(root)).text_columns
    known = TASKS.get(provenance.task["name"])
    same = known is not None and known.num_labels == provenance.model["num_labels"]
    return known.text_columns if known is not None and same else ()


def wanted(
    found: Found, text: str | None = None, pair: str | None = None, keep: Sequence[str] = ()
) -> Wanted:
    """Which columns of an input to read: those named, or the task's own, or ``text``.

    Args:
        keep: of each column to keep ``COLUMN``, or ``NEW=COLUMN`` to call it otherwise.

    Raises:
        InputError: one column for a task on two texts or the reverse, or a name that answers have.
    """
    task = found.provenance.task["name"]
    columns = found.text_columns
    width = len(columns) or None
    if pair is not None and text is None:
        raise InputError(f"--pair {pair}: names the second texts' column; name the first with "
                         "--text")  # fmt: skip
    if pair is not None and width == 1:
        raise InputError(f"--pair {pair}: {task} is a task on one text; leave it out")
    if text is not None and pair is None and width == 2:
        raise InputError(
            f"--text {text}: {task} is a task on two texts; name the second's column with --pair"
        )
    named = () if text is None else (text,) if pair is None else (text, pair)
    usual = {1: (columns, ("text",)), 2: (columns, ("text", "pair"))}.get(width or 0, (("text",),))
    kept: dict[str, str] = {}
    for item in keep:
        new, _, column = item.rpartition("=")
        kept[_free(new or column, kept, item)] = column
    # dict.fromkeys: a task's own column may be called "text".
    return Wanted(named, tuple(dict.fromkeys(usual)), kept, width, task)


def _free(name: str, taken: dict[str, str], item: str) -> str:
    if name in taken or name in ("text", "pair", *CLASSES, *NUMBERS, *BESIDE):
        raise InputError(
            f"--keep {item}: the answers have a column {name!r} already; give it another name, "
            f"as in --keep my_{name}={item.rpartition('=')[2]}"
        )
    return name


def found_threshold(
    found: Found, target: float, confidence: float, score: str, k: int | None = None
) -> tuple[RiskThreshold, str]:
    """The threshold of a target risk on the run's stored predictions, and the split's name.

    Raises:
        InputError: no figures of a default split there, or as `abstention.risk_threshold`.
    """
    if not (found.root / "metrics.json").is_file():
        raise InputError(
            f"--target-risk {target:g}: {found.root} has no metrics.json, so no labelled examples "
            "to find a threshold on; evaluate the run first ('bayesian-lora eval RUN'), or give "
            "--abstain-above"
        )
    stored = load_predictions(found.root)
    if k is not None:
        if not 1 <= k <= stored.num_members:
            raise InputError(f"--k {k}: the run has {stored.num_members} samples; choose 1 to "
                             f"{stored.num_members}")  # fmt: skip
        weights = stored.weights[:k] / stored.weights[:k].sum()
        stored = dataclasses.replace(stored, logits=stored.logits[:k], weights=weights)
    split = str(read_json(found.root / "metrics.json", "metrics")["split"])
    return risk_threshold(stored, target, confidence, score), split


def open_service(
    found: Found,
    abstention: Abstention | None = None,
    *,
    k: int | None = None,
    tolerance: float | None = None,
    device: str = "auto",
) -> tuple[Service, Predictor]:
    """Members and model in memory, ready to answer.

    Raises:
        InputError: damaged members, another base model than theirs, a k, tolerance or score that
            they do not have, or no such device.
    """
    place = resolve_device(device)
    members = found.load(k)
    members.check_tolerance(tolerance)
    adaptive = tolerance is not None
    Service.of(members, abstention, with_used=adaptive)  # tells mistakes before the model is loaded
    from transformers import AutoTokenizer

    model = load_model(members.provenance, place)
    tokenizer = load_pretrained(AutoTokenizer, model.info.source)
    predictor = Predictor(members, model, tokenizer, tolerance)
    names = found.provenance.task["label_names"] or _base_names(model, found)
    service = Service.of(
        members, abstention, predict=predictor, label_names=names, with_used=adaptive
    )
    return service, predictor


def _base_names(model: HuggingFaceLora, found: Found) -> list[str]:
    """The label names of a base model that was fine-tuned to as many classes, none if they are
    but LABEL_0, LABEL_1, …
    """
    size = found.provenance.model["num_labels"]
    given = getattr(model.base.config, "id2label", None) or {}
    names = [str(given.get(c, f"LABEL_{c}")) for c in range(size)]
    plain = found.regression or any(name == f"LABEL_{c}" for c, name in enumerate(names))
    return [] if plain or len(set(names)) < size else names
