"""The rooms and who may import whom, as the design lists them, and the house's other rules.

A new module fails here until it has its row in `ROWS`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bayesian_lora

SOURCE = Path(bayesian_lora.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Each module imports from rows above its own only; within a row, from its own folder.
ROWS: dict[float, tuple[str, ...]] = {
    -1: ("errors", "samplers.schedules", "config_schema", "utils.text_table"),
    -0.5: ("config_checks", "scores.array_checks"),
    0: (
        "utils.lora_params",
        "utils.rng",
        "utils.files",
        "utils.hub",
        "utils.checkpoint",
        "utils.lock",
        "utils.tracking",
        "utils.metrics_log",
        "utils.record_streams",
        "metrics",
        "diagnostics",
        "assessment.summary",
        "monitoring.welford",
        "monitoring.online",
        "scores.selective",
        "scores.regression_scores",
        "progress",
        "config",
    ),
    0.5: (
        "scores.bootstrap",
        "scores.calibration",
        "scores.detection",
        "scores.resampled_figures",
        "scores.ood_scores",
    ),
    0.75: ("assessment.ood_table",),
    1: (
        "models.first_order",
        "models.turn",
        "models.flat",
        "models.chain_dropout",
        "models.frozen_linear",
        "models.group_attention",
        "models.prefix",
        "models.flat_attention",
        "models.lora_update",
        "models.chain_lora",
        "models.sources",
        "posterior",
        "data.examples",
        "data.tasks",
        "data.text_files",
        "data.text_streams",
        "data.shifted",
        "data.synthetic",
        "data.local_files",
        "data.hub",
        "data.glue_datasets",
        "data.token_cache",
        "data.batching",
        "data.joined",
        "data.preparation",
        "samplers.base",
        "samplers.flat",
        "samplers.failures",
        "samplers.heat",
    ),
    2: (
        "models.hf_lora",
        "models.task_heads",
        "models.mixing",
        "models.peft_io",
        "samplers.sgld",
        "samplers.psgld",
        "samplers.asgld",
        "samplers.sghmc",
        "samplers.sgnht",
        "samplers.csgld",
        "samplers.sam_sgld",
        "samplers.sam_sgld_rank1",
        "samplers.control_variate",
    ),
    3: (
        "predict",
        "account",
        "verification.toy",
        "verification.laws",
        "verification.mutations",
        "verification.variants",
        "verification.report",
    ),
    3.5: ("objective", "adaptive", "abstention"),
    4: (
        "traces",
        "kept_fits",
        "monitoring.milestones",
        "learning_rates",
        "warm_start",
        "sampling",
        "member_files",
        "ensemble",
        "run_folder",
        "manifest",
        "energy_range",
    ),
    4.5: (
        "serving",
        "assessment.evaluation",
        "assessment.ensemble_curve",
        "assessment.standard_errors",
        "assessment.run_rows",
        "assessment.diagrams",
        "assessment.stored",
    ),
    5: (
        "composition.stack",
        "composition.task_data",
        "composition.stack_model",
        "composition.stack_objective",
        "composition.fit",
        "composition.retrain",
        "composition.state_dicts",
        "composition.sources",
        "composition.compatibility",
        "composition.joint_facts",
        "composition.stacking",
        "composition.stack_files",
        "composition.merging",
        "composition.fitting",
        "composition.stack_evaluation",
        "composition.columns",
        "composition.column_files",
        "composition.growth_report",
        "composition.sequential",
        "composition.experts",
        "composition.gated_model",
        "composition.gates",
        "composition.gate_report",
        "composition.gate_files",
        "composition.subspaces",
        "composition.pair_figures",
        "composition.similarity",
    ),
    6: (
        "report.heatmaps",
        "report.charts",
        "report.drawing",
        "report.run_files",
        "report.run_report",
        "report.run_figures",
        "report.verdicts",
        "report.run_calibration",
        "report.run_chains",
        "report.run_inputs",
        "report.run_made",
        "report.comparison_report",
        "report.page",
        "report.record",
        "report.anchors",
        "report.observations",
        "report.study_baselines",
        "report.study_gates",
        "report.study_growth",
        "report.study_ranks",
        "report.study_subspaces",
        "report.study_tables",
    ),
    7: (
        "experiment.building",
        "experiment.run_metrics",
        "experiment.compose",
        "experiment.gating",
        "experiment.growing",
        "experiment.stack_eval",
        "experiment.task_sets",
        "experiment.study",
        "experiment.study_config",
        "experiment.study_context",
        "experiment.study_growth",
        "experiment.study_runs",
        "experiment.study_schema",
        "experiment.study_stacks",
        "experiment.study_steps",
        "experiment.setup",
        "experiment.samplers",
        "experiment.priors",
        "experiment.starts",
        "experiment.resume",
        "experiment.provenance",
        "experiment.compare",
        "experiment.cells",
        "experiment.comparison_table",
        "experiment.run",
        "experiment.phases",
        "experiment.train",
        "experiment.evaluate",
        "experiment.stored_figures",
        "experiment.ood",
        "experiment.predicting",
        "experiment.report",
        "experiment.step_log",
    ),
    8: (
        "cli.main",
        "cli.doctor",
        "cli.verify",
        "cli.compare",
        "cli.stack",
        "cli.options",
        "cli.retrain",
        "cli.similarity",
        "cli.sequential",
        "cli.gate",
        "cli.study",
        "cli.ood",
        "cli.predict",
        "cli.text_input",
        "cli.report",
    ),
}
ROW = {module: row for row, modules in ROWS.items() for module in modules}
# The modules of this row build on one another: the run's phases and what they write.
JOINED_ROW = 4
CONFIG = {"config", "config_checks", "config_schema"}
HEAVY = ("torch", "transformers", "peft", "datasets", "torchmetrics")


def module_name(path: Path) -> str:
    """``models.hf_lora``; of a package its name (the root's is empty)."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LEAVES = sorted(MODULES.keys() - PACKAGES)


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every import, also inside functions and for type checking: (module, name or "")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports(tree: ast.AST) -> Iterator[str]:
    """The package's modules that are imported, without the package's name."""
    for module, name in imported(tree):
        if module.partition(".")[0] == "bayesian_lora":
            whole = f"{module}.{name}" if f"{module}.{name}"[14:] in MODULES else module
            if (whole, name) != ("bayesian_lora", "__version__"):
                yield whole[14:]


def test_every_module_has_its_row() -> None:
    assert sorted(ROW) == LEAVES, "list a new module in ROWS, take a deleted one out"


@pytest.mark.parametrize("module", LEAVES)
def test_imports_come_from_rows_above(module: str) -> None:
    folder, row = module.rpartition(".")[0], ROW[module]
    for other in own_imports(TREES[module]):
        assert other in ROW, f"{module} imports {other or 'the package'}: import the module itself"
        same_room = (folder and folder == other.rpartition(".")[0]) or row == JOINED_ROW
        allowed = ROW[other] < row or (ROW[other] == row and same_room)
        assert allowed, f"{module} (row {row:g}) must not import {other} (row {ROW[other]:g})"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: set(own_imports(TREES[module])) for module in LEAVES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_package_fronts_are_lazy() -> None:
    """At the top of an `__init__` only the standard library and imports for type checking."""
    for name in PACKAGES:
        for node in TREES[name].body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert all(module == "typing" for module, _ in imported(node)), name


def test_samplers_know_no_transformers() -> None:
    for name in MODULES:
        if name.startswith("samplers"):
            found = {module.partition(".")[0] for module, _ in imported(TREES[name])}
            assert not found & {"transformers", "peft", "datasets"}, name


def test_only_the_top_rooms_know_the_config() -> None:
    for name in LEAVES:
        if name.partition(".")[0] not in ("experiment", "cli", *CONFIG):
            assert not CONFIG & set(own_imports(TREES[name])), name


@pytest.mark.parametrize("module", ["bayesian_lora", "bayesian_lora.cli.main"])
def test_imports_are_quick(module: str) -> None:
    code = f"import {module}, sys; print(*sorted(sys.modules.keys() & {set(HEAVY)}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_diagnostics_wait_until_they_are_needed() -> None:
    """A run reaches its first step without ArviZ, whose import is felt."""
    code = "import bayesian_lora.experiment.train, sys; print('arviz_stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda name: name or "bayesian_lora")
def test_no_global_seed_is_set(module: str) -> None:
    """Generators are passed; torch's, numpy's and Python's own state belong to the user."""
    forbidden = ("torch.manual_seed", "cuda.manual_seed", "random.seed", "random.manual_seed")
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            written = ast.unparse(node)
            assert not written.endswith(forbidden), f"{module}:{node.lineno}: {written}"
        if isinstance(node, ast.Name):
            assert node.id not in ("manual_seed", "set_seed"), f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda name: name or "bayesian_lora")
def test_files_and_functions_are_short(module: str) -> None:
    lines = MODULES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= 300, f"{module} has {lines} lines, at most 300"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef):
            length = _code_lines(node)
            assert length <= 50, f"{module}:{node.lineno} {node.name} has {length} lines"


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines from ``def`` to the end, less the docstring."""
    assert function.end_lineno is not None
    first = function.body[0]
    docstring = 0
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        docstring = first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring
