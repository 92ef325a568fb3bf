"""Studies: what a config may say, what is made again and what is not, and one study whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayesian_lora.errors import InputError
from bayesian_lora.experiment import study as runner
from bayesian_lora.experiment.study import failed_steps, run_study
from bayesian_lora.experiment.study_config import load_study
from bayesian_lora.experiment.study_context import Context, Step
from bayesian_lora.experiment.study_steps import plan_steps
from bayesian_lora.progress import Progress
from bayesian_lora.report.page import Page

CONFIGS = Path(__file__).parents[2] / "configs" / "lora_ensembling"
DEMO = CONFIGS / "study_demo.yaml"
Figures = dict[str, Any]
QUIET = Progress(quiet=True)


class Lines(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        self.lines.append(line)


class Steps:
    """Steps that count how often they are made; `settings`, `fails` and `dies` by name."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.settings: dict[str, int] = {}
        self.fails: set[str] = set()
        self.dies: set[str] = set()
        self.resumes = False

    def plan(self, _: object) -> list[Step]:
        return [
            self._step("first"),
            self._step("second", ("first",)),
            self._step("third", ("second",)),
            self._step("other"),
        ]

    def _step(self, name: str, needs: tuple[str, ...] = ()) -> Step:
        settings = {"value": self.settings.get(name, 0)}

        def make(context: Context, folder: Path) -> Figures:
            self.made.append(name)
            before = sorted(path.name for path in folder.iterdir() if path.name != "step.json")
            (folder / "half.txt").write_text("half")
            if name in self.dies:
                raise KeyboardInterrupt
            if name in self.fails:
                raise InputError(f"{name} cannot be made")
            sums = [context.figures[other]["value"] for other in needs]
            return {"value": settings["value"] + sum(sums), "before": before, "odd": float("nan")}

        return Step(name, f"the {name}", settings, make, needs, self.resumes)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found = Steps()
    monkeypatch.setattr(runner, "plan_steps", found.plan)
    monkeypatch.setattr(
        runner.observations, "observations", lambda record: Page(str(record["steps"]), "", [])
    )
    return found


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """The lines a study of those steps prints."""

    def call(*overrides: str, **options: Any) -> list[str]:
        said = Lines()
        run_study(DEMO, [f"output.dir={tmp_path / 'study'}", *overrides], said, **options)
        return said.lines

    return call


def record(folder: Path, name: str) -> Figures:
    return json.loads((folder / "study" / name / "step.json").read_text())


def test_a_finished_step_is_not_made_again(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run()
    assert steps.made == ["first", "second", "third", "other"]
    lines = run()
    assert len(steps.made) == 4
    assert sum("already done" in line for line in lines) == 4
    assert record(tmp_path, "third")["figures"] == {"value": 0, "before": [], "odd": None}


def test_changed_settings_make_a_step_and_what_needs_it_again_and_keep_the_former(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run()
    steps.settings["second"] = 5
    lines = run()
    assert steps.made[4:] == ["second", "third"]
    assert record(tmp_path, "third")["figures"]["value"] == 5
    assert record(tmp_path, "second.1")["figures"]["value"] == 0
    assert (tmp_path / "study" / "second.1" / "half.txt").is_file()
    kept = tmp_path / "study" / "second.1"
    assert f"  changed since it was made (value: 0 there, 5 here); the former is in {kept}" in lines
    third = tmp_path / "study" / "third.1"
    assert f"  changed since it was made (second is another); the former is in {third}" in lines
    steps.settings["second"] = 6
    run()
    assert record(tmp_path, "second.2")["figures"]["value"] == 5


def test_a_failed_step_leaves_those_that_need_it_waiting_and_is_tried_again(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    steps.fails = {"second"}
    lines = run()
    assert steps.made == ["first", "second", "other"]
    assert failed_steps(tmp_path / "study") == ["second", "third"]
    assert "third waiting: it needs second" in lines
    assert any("second cannot be made" in line for line in lines)
    assert "second cannot be made" in (tmp_path / "study" / "observations.html").read_text()
    steps.fails = set()
    run()
    assert steps.made[3:] == ["second", "third"]
    assert failed_steps(tmp_path / "study") == []


@pytest.mark.parametrize("resumes", [False, True])
def test_a_killed_step_starts_again(
    resumes: bool, steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    steps.dies, steps.resumes = {"second"}, resumes
    said = Lines()
    folder = tmp_path / "study"
    with pytest.raises(KeyboardInterrupt):
        run_study(DEMO, [f"output.dir={folder}"], said)
    command = f"bayesian-lora study {DEMO} output.dir={folder}"
    assert said.lines[-1] == f"\n1 of 4 steps are done and stay in {folder}; go on with: {command}"
    assert not (folder / "run.lock").exists()
    steps.dies = set()
    run()
    assert steps.made == ["first", "second", "second", "third", "other"]
    assert record(tmp_path, "second")["figures"]["before"] == (["half.txt"] if resumes else [])


def test_a_folder_of_something_else_is_left_alone(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds thesis.txt and no study"):
        run()
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["thesis.txt"]
    assert steps.made == []


def test_a_step_s_folder_that_is_not_one_is_left_alone(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run()
    folder = tmp_path / "study" / "second"
    (folder / "step.json").unlink()
    with pytest.raises(InputError, match="holds no step of a study"):
        run()
    assert (folder / "half.txt").is_file()


def test_the_report_alone(steps: Steps, run: Callable[..., list[str]], tmp_path: Path) -> None:
    run()
    record_before = (tmp_path / "study" / "study.json").read_text()
    report = tmp_path / "study" / "observations.html"
    shown = report.read_text()
    report.unlink()
    steps.made.clear()
    run(report_only=True)
    assert steps.made == []
    assert report.read_text() == shown
    assert (tmp_path / "study" / "study.json").read_text() == record_before


def test_a_report_alone_names_the_command_that_made_the_study(
    steps: Steps,
    run: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run()
    commands: list[str] = []

    def page(made: Figures) -> Page:
        commands.append(made["command"])
        return Page("", "", [])

    monkeypatch.setattr(runner.observations, "observations", page)
    run("device=cpu", report_only=True)
    assert "device=cpu" not in commands[0]


def test_a_report_alone_of_nothing_makes_nothing(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no study there to report on; make it, without"):
        run(report_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_report_alone_with_other_settings_drops_no_figures(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run()
    files = ("study.json", "observations.html", "second/step.json")
    before = [(tmp_path / "study" / name).read_bytes() for name in files]
    steps.settings["second"] = 5
    words = r"second was made with other settings \(value: 0 there, 5 here\); give those"
    with pytest.raises(InputError, match=words):
        run(report_only=True)
    assert [(tmp_path / "study" / name).read_bytes() for name in files] == before


@pytest.mark.parametrize("below", ["", "study"])
def test_a_file_in_the_place_of_the_folder_is_named(
    below: str, steps: Steps, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"file is a file; name another folder"):
        run_study(DEMO, [f"output.dir={file / below}"], QUIET)
    assert file.read_text() == "mine"
    assert steps.made == []


def test_a_damaged_record_is_named(
    steps: Steps, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run()
    path = tmp_path / "study" / "first" / "step.json"
    path.write_text(path.read_text().replace('"finished"', '"pending"'))
    with pytest.raises(InputError, match=r"first/step.json: damaged"):
        run()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sead=1"], "did you mean|seed"),
        (["further.recipe.lr=0"], "further.recipe.lr|greater than 0"),
        (["stacks.both=[small,big]"], "stacks.both: 'big' is none of tasks"),
        (["stacks.both=[small]"], "a stack needs two or more"),
        (["stacks.both=[small,small]"], "twice"),
        (["further.stack=all"], "further.stack: 'all' is none of stacks"),
        (["further.variants.x={tasks: []}"], "further.variants.x: tasks is empty"),
        (["further.variants.x={tasks: [small], part: big}"], "'big' is none of the stack's tasks"),
        (["rank_study.task=big"], "rank_study.task: 'big'"),
        (["gates.stack=null"], "need gates.stack"),
        (["baselines.data.batch_size=0"], "tasks.small: "),
        (["tasks.x=nowhere.yaml"], "tasks.x: config .* not found"),
        (["tasks.a/b=demo_small.yaml"], "'a/b' cannot name"),
    ],
)
def test_mistakes_in_a_config_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_study(DEMO, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tasks.keys=demo_small.yaml"], "a word that PyTorch's modules use"),
        (["baselines.data.name=stsb"], "is a regression or a data set of your own"),
        (["experts.run.sampler.thin=0"], "experts.run: "),
        (["rank_study.run.train.lr=-1"], "rank_study.run: "),
        (["device=abacus"], "tasks.small: device='abacus'"),
    ],
)
def test_what_cannot_be_made_is_known_before_anything_is(
    overrides: list[str], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    with pytest.raises(InputError, match=words):
        run_study(DEMO, [f"output.dir={folder}", *overrides], QUIET)
    assert not folder.exists()


def test_a_step_depends_on_its_own_keys_alone() -> None:
    def digests(*overrides: str) -> dict[str, str]:
        study = load_study(DEMO, overrides)
        made = runner.Runner(study, plan_steps(study), QUIET, "")
        return {name: entry["digest"] for name, entry in made.entries.items()}

    usual = digests()

    def changed(*overrides: str) -> set[str]:
        return {name for name, digest in digests(*overrides).items() if digest != usual[name]}

    gates = {"gate-sequence", "gate-arrow", "gate-sequence_unfrozen", "ensemblegate-ensembles"}
    assert changed("output.dir=elsewhere", "gates.kinds=[arrow,sequence]") == set()
    assert changed("gates.temperature=2") == gates
    assert changed("rank_study.run.train.epochs=3") == {"rank-1", "rank-2"}
    assert changed("sequential.recipe.lr=0.1") == {"sequential"}
    assert changed("further.variants.on_small.mixing=sum") == {"further-both", "drift-both"}
    assert changed("stacking.density=0.4") == {"stack-both", "further-both", "drift-both", *gates}
    assert changed("seed=1") == set(usual)


@pytest.mark.parametrize(
    ("override", "seeds"),
    [
        ("starts=independent", [1, 2]),
        ("starts=shared", [0, 0]),
        ("starts=null", [None, None]),
        ("baselines.train.init_seed=7", [7, 7]),
    ],
)
def test_where_baselines_start(override: str, seeds: list[int | None]) -> None:
    found = load_study(DEMO, [override]).baselines.values()
    assert [config.train.init_seed for config in found] == seeds


def test_the_shipped_study_is_that_of_the_issue() -> None:
    study = load_study(CONFIGS / "study.yaml", ["data.dir=."])
    names = [step.name for step in plan_steps(study)]
    assert names[:3] == ["baseline-sst2", "baseline-cola", "baseline-mnli"]
    assert {"stack-all", "further-sst2_cola", "drift-sst2_cola", "similarity"} < {*names}
    assert {f"rank-{rank}" for rank in (1, 2, 4, 8, 16)} < {*names}
    assert {"sequential", "gate-sequence", "ensemblegate-ensembles"} < {*names}
    for config in study.baselines.values():
        assert (config.data.train_examples or 0) <= 10_000
        assert config.model.lora.rank == 1
        assert list(config.model.lora.target_modules) == ["query", "key", "value"]


SMALL = (
    "further.variants={on_small: {tasks: [small]}, both: {tasks: [small, large], mixing: sum}}",
    "stacking.merging=[ties]",
    "gates.kinds=[sequence]",
    "gates.unfrozen=[]",
    "rank_study.task=null",
    "experts=null",
)


def test_a_study_from_start_to_end(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    text = DEMO.read_text().replace("demo_", f"{CONFIGS}/demo_")
    head, _, rest = text.partition("  variants:")
    small.write_text(head + rest[rest.index("\nsequential:") :])
    overrides = [f"baselines.model.name={tiny_models['bert']}", f"output.dir={tmp_path / 'out'}"]
    root = run_study(small, [*SMALL, *overrides], QUIET)
    assert failed_steps(root) == []
    report = (root / "observations.html").read_text(encoding="utf-8")
    figures = json.loads((root / "stack-both" / "step.json").read_text())["figures"]
    exact = figures["ways"]["exact"]["figures"]["small"]["validation"]
    assert f"{exact['nll']:.4f}" in report
    assert figures["alone"]["small"]["validation"]["n"] == exact["n"] == 200
    assert "No step" not in report
    assert "has not been made yet" not in report
    assert (root / "further-both" / "on_small" / "stack.json").is_file()
    assert (root / "gate-sequence" / "gated" / "gate.safetensors").is_file()
    said = Lines()
    shutil.rmtree(root / "similarity")
    run_study(small, [*SMALL, *overrides], said)
    made = [line for line in said.lines if ": done in" in line]
    assert len(made) == 1
    assert "similarity" in made[0]


@pytest.mark.slow
def test_the_demo_study_whole(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    overrides = [f"baselines.model.name={tiny_models['bert']}", f"output.dir={tmp_path / 'out'}"]
    root = run_study(DEMO, overrides, QUIET)
    steps = json.loads((root / "study.json").read_text())["steps"]
    assert {entry["status"] for entry in steps.values()} == {"finished"}
    report = (root / "observations.html").read_text(encoding="utf-8")
    assert str(tiny_models["bert"]) not in report.replace(f"={tiny_models['bert']}", "")
