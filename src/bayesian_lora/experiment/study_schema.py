"""The schema of a study: every key, its default and range, as a tree of pydantic dataclasses."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bayesian_lora.config_schema import Count, NonNegative, Positive

Seed = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass
class RecipeConfig:
    """How a stack, a grown column or a gate is trained: Adam under a plateau schedule.

    `train_examples` of those that the task's baseline was fitted on, null for all; what was held
    out of them is held out here too.
    `steps_per_epoch`: null is one pass over the largest of the chains' data.
    """

    train_examples: Annotated[int, Field(ge=2)] | None = None
    epochs: Count = 5
    steps_per_epoch: Count | None = None
    batch_size: Count = 32
    lr: Positive = 2e-3
    patience: Count | None = 3
    prior_std: Positive = 1.0


@dataclass
class StackingConfig:
    """What is measured beside exact stacking: fitted weights, compression, PEFT's merging."""

    fit_examples: Annotated[int, Field(ge=2)] = 128
    compress_rank: Count | None = 1
    merging: list[Literal["ties", "dare_linear", "dare_ties"]] = field(
        default_factory=lambda: ["ties", "dare_ties"]
    )
    density: Annotated[float, Field(gt=0, le=1)] = 0.5


@dataclass
class VariantConfig:
    """One way to train a stack further: on which tasks, how their batches mix, what is trained.

    `part`: only the columns that came from this task's adapter move.
    """

    tasks: list[str] = field(default_factory=list)
    mixing: Literal["alternate", "sum"] = "alternate"
    part: str | None = None
    orthogonality: NonNegative = 0.0
    distillation: NonNegative = 0.0


@dataclass
class FurtherConfig:
    """Further training of one stack, all variants at once along the chain dimension."""

    stack: str | None = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    variants: dict[str, VariantConfig] = field(default_factory=dict)


@dataclass
class SequentialConfig:
    """A stack grown task by task, in this order."""

    order: list[str] = field(default_factory=list)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


@dataclass
class GatesConfig:
    """Gates over the adapters of one stack, frozen; of `unfrozen` kinds trained with them too.

    `unfrozen_lr`: the learning rate then, which suits adapters rather than gates; None: the same.
    """

    stack: str | None = None
    kinds: list[Literal["adapter", "layer", "sequence", "token", "arrow"]] = field(
        default_factory=list
    )
    unfrozen: list[Literal["adapter", "layer", "sequence", "token"]] = field(default_factory=list)
    unfrozen_lr: Positive | None = None
    temperature: Positive = 1.0
    top_k: Count | None = None
    load_balance: NonNegative = 0.01
    recipe: RecipeConfig = field(default_factory=RecipeConfig)


@dataclass
class ExpertsConfig:
    """A short posterior run for each task from its baseline, and a gate over the ensembles.

    `run`: keys of a run's config; `kind`: of the gate; `gate_steps`: of SGLD on the gate itself
    after its fit, 0 for none.
    """

    kind: Literal["adapter", "layer", "sequence", "token"] = "sequence"
    run: dict[str, Any] = field(default_factory=dict)
    gate_steps: Annotated[int, Field(ge=0)] = 0
    gate_step_size: Positive = 1e-3


@dataclass
class RankStudyConfig:
    """One task at several ranks; `chains` independent fits of each give the spread."""

    task: str | None = None
    ranks: list[Count] = field(default_factory=list)
    chains: Annotated[int, Field(ge=2)] = 3
    run: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluationConfig:
    """What stacks and gates are measured on: every split of a task or its default one, all its
    examples or so many; baselines are measured on all of every split besides.
    """

    splits: Literal["all", "default"] = "all"
    examples: Annotated[int, Field(ge=2)] | None = None


@dataclass
class StudyData:
    """As a run's `data.dir`."""

    dir: str | None = None


@dataclass
class StudyOutput:
    """The study's folder; `runs/<name of the config file>` by default."""

    dir: str | None = None


@dataclass
class StudyConfig:
    """A study of LoRA ensembling, whole.

    `tasks`: name → the config of its baseline, beside the study's file; `baselines`: keys of a
    run's config for all of them; `stacks`: name → the tasks whose adapters it joins. `starts`:
    whether all baselines begin at the same factors; null is as their configs say. A section that
    is left out is a part of the study that is not made.
    """

    seed: Seed = 0
    device: str = "auto"
    tasks: dict[str, str] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)
    starts: Literal["independent", "shared"] | None = None
    stacks: dict[str, list[str]] = field(default_factory=dict)
    stacking: StackingConfig = field(default_factory=StackingConfig)
    further: FurtherConfig = field(default_factory=FurtherConfig)
    sequential: SequentialConfig = field(default_factory=SequentialConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    experts: ExpertsConfig | None = None
    rank_study: RankStudyConfig = field(default_factory=RankStudyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    data: StudyData = field(default_factory=StudyData)
    output: StudyOutput = field(default_factory=StudyOutput)
