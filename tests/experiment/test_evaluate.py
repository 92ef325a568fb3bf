"""`eval` of a finished run: all, some or one member, splits by name, and what is wrong with files.

Shapes: M chains, K members, N examples.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from transformers import AutoTokenizer

from bayesian_lora.adaptive import FEWEST
from bayesian_lora.assessment.evaluation import LEFT_OUT
from bayesian_lora.assessment.stored import load_predictions
from bayesian_lora.cli.main import main
from bayesian_lora.config import load_run_config
from bayesian_lora.data.examples import split_off, stratified_subset
from bayesian_lora.data.synthetic import generate
from bayesian_lora.ensemble import Ensemble, map_ensemble
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.evaluate import MOST_HELD_OUT, evaluate_run, held_out_set
from bayesian_lora.metrics import temperature_scale
from bayesian_lora.progress import Progress
from bayesian_lora.utils.files import read_json, write_json, write_npz

from .small_runs import SMALL, K, small_run

WRONG = ("0.0", "1.0", "-1.0", "nan", "inf")


@pytest.fixture(scope="module")
def finished(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tiny_models["bert"], tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


Evaluate = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """The command's status, standard output and standard error."""

    def call(*arguments: str | Path) -> tuple[Any, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["eval", *map(str, arguments)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return call


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def figures(path: Path) -> dict[str, Any]:
    """The contents of a metrics file but for the time the evaluation took."""
    value = json.loads(path.read_text(), parse_constant=pytest.fail)
    del value["cost"]["eval_s"], value["checksum"]
    return value


def assert_same_figures(a: Any, b: Any) -> None:
    """Equal up to the rounding of passes of other sizes."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_figures(a[key], b[key])
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    else:
        assert a == b


def test_eval_repeats_what_train_found(run: Path, evaluate: Evaluate) -> None:
    before = figures(run / "metrics.json")
    (run / "metrics.json").unlink()
    (run / "predictions" / "validation.npz").unlink()
    code, out, err = evaluate(run)
    assert (code, err) == (0, "")
    assert_same_figures(figures(run / "metrics.json"), before)
    assert (run / "predictions" / "validation.npz").is_file()
    nll, accuracy = before["ensemble"]["nll"], before["ensemble"]["accuracy"]
    assert f"LoRA Ensemble@6 — Acc: {accuracy:.1%} | NLL: {nll:.4f}" in out


def test_eval_finds_the_run_that_a_config_made(finished: Path, evaluate: Evaluate) -> None:
    by_config = evaluate(finished.parent / "small.yaml")
    assert by_config == evaluate(finished)


def test_eval_reads_the_folder_that_an_override_names(
    run: Path, finished: Path, evaluate: Evaluate
) -> None:
    code, out, _ = evaluate(finished.parent / "small.yaml", f"output.dir={run}")
    assert code == 0
    assert f"Found 6 LoRA samples in {run}\n" in out


@pytest.mark.parametrize(
    ("flags", "k", "first"), [(["--k", "4"], 4, 0), (["--k", "1"], 1, 0), (["--single"], 1, K - 1)]
)
def test_a_part_of_the_members_is_looked_at_and_nothing_stored(
    run: Path, evaluate: Evaluate, flags: list[str], k: int, first: int
) -> None:
    before = snapshot(run)
    code, out, _ = evaluate(run, *flags)
    assert code == 0
    assert snapshot(run) == before
    with np.load(run / "predictions" / "validation.npz") as stored:
        p = softmax(stored["logits"][first : first + k].astype(np.float64), axis=-1).mean(0)
        y = stored["labels"]
    nll, accuracy = -np.log(p[np.arange(len(y)), y]).mean(), (p.argmax(1) == y).mean()
    assert f"LoRA Ensemble@{k} — Acc: {accuracy:.1%} | NLL: {nll:.4f}" in out
    assert f"Found 6 LoRA samples in {run}" in out
    assert f"Evaluating ensemble of {k} LoRA samples" in out
    assert f"  - Sample range: {first} - {first + k - 1}" in out


def test_k_of_all_is_all(run: Path, evaluate: Evaluate) -> None:
    (run / "metrics.json").unlink()
    assert evaluate(run, "--k", str(K))[0] == 0
    assert (run / "metrics.json").is_file()


@pytest.mark.parametrize("flags", [[], ["--k", "5"], ["--split", "shifted"]])
def test_a_tolerance_leaves_members_out_and_nothing_is_stored(
    run: Path, evaluate: Evaluate, flags: list[str]
) -> None:
    before = snapshot(run)
    code, out, err = evaluate(run, *flags, "--tolerance", "0.3")
    assert (code, err) == (0, "")
    assert snapshot(run) == before
    k = 5 if "--k" in flags else K
    used = re.search(rf"Members used: (\S+) of {k} an input on average \(tolerance 0.3\)", out)
    assert used is not None
    assert FEWEST <= float(used[1]) < k
    assert f"LoRA Ensemble@{k} — Acc: " in out
    assert re.search(r"^single sample \(mean\) +n/a +n/a", out, re.MULTILINE)
    assert "mutual information n/a" in out
    assert f"not available: {LEFT_OUT}" in out


def test_figures_under_a_tolerance(run: Path) -> None:
    quiet = Progress(quiet=True)
    whole = evaluate_run(run, progress=quiet)
    near = evaluate_run(run, tolerance=0.05, progress=quiet)
    assert "adaptive" not in whole
    assert near["adaptive"]["tolerance"] == 0.05
    assert near["adaptive"]["members_used"] < K
    assert near["ensemble"]["nll"] == pytest.approx(whole["ensemble"]["nll"], abs=0.05)
    assert near["ensemble"]["nll"] != whole["ensemble"]["nll"]
    assert_same_figures(near["map"], whole["map"])
    # So near that none was left out: nothing is missing, and nothing stored all the same.
    before = snapshot(run)
    same = evaluate_run(run, tolerance=1e-9, progress=quiet)
    assert snapshot(run) == before
    assert same["adaptive"]["members_used"] == K
    assert_same_figures(same["uncertainty"], whole["uncertainty"])
    assert_same_figures(same["single"], whole["single"])


def test_another_split_has_files_of_its_own(run: Path, evaluate: Evaluate) -> None:
    before = snapshot(run)
    code, out, _ = evaluate(run, "--split", "shifted")
    assert code == 0
    assert "on shifted..." in out
    after = snapshot(run)
    assert set(after) - set(before) == {"metrics.shifted.json", "predictions/shifted.npz"}
    assert {name: after[name] for name in before} == before
    found = figures(run / "metrics.shifted.json")
    assert (found["split"], found["n"]) == ("shifted", 600)
    usual = figures(run / "metrics.json")
    assert found["truth"]["bayes_nll"] != usual["truth"]["bayes_nll"]
    assert found["ensemble"]["nll"] != usual["ensemble"]["nll"]
    parameters = figures(run / "metrics.json")["parameters"]
    assert found["parameters"] == pytest.approx(parameters)


def test_one_member_alone_has_no_mutual_information(finished: Path) -> None:
    found = evaluate_run(finished, members="latest", progress=Progress(quiet=True))
    assert found["uncertainty"]["mutual_information"] is None
    assert found["uncertainty"]["mutual_information_reason"]
    assert found["single"]["nll"]["sd"] is None
    assert found["sample_range"] == [K - 1, K - 1]


def test_a_run_without_a_sampling_step_has_no_heat(run: Path) -> None:
    status = read_json(run / "run.json", "run")
    write_json(run / "run.json", {**status, "t_eff": None, "traces": {"parts": 0, "starts": False}})
    shutil.rmtree(run / "traces")
    found = evaluate_run(run, progress=Progress(quiet=True))["diagnostics"]
    assert found["t_eff"] is None
    assert found["t_eff_reason"]
    assert found["verdict"] == "not available"
    assert found["rhat_max"] is None
    assert found["rhat_max_reason"]


def test_both_kinds_of_fits_stand_beside_the_ensemble(finished: Path) -> None:
    """Sampling began from the last epoch's; one epoch was all there was, so both are alike."""
    found = figures(finished / "metrics.json")
    assert found["map_last"] == found["map"]
    assert_same_figures(found["map_early_stopped"], found["map"])
    scaled = found["map_early_stopped_temperature_scaled"]
    assert_same_figures(scaled, found["map_temperature_scaled"])
    errors = found["standard_errors"]
    assert errors["ensemble"]["nll"] > errors["differences"]["ensemble-map_ensemble"]["nll"] > 0


def test_without_a_record_of_their_epoch_there_are_no_other_fits(run: Path) -> None:
    """As a run of an older version left it."""
    manifest = read_json(run / "ensemble.json", "ensemble")
    for name in ("starts_are", "alternatives", "alternatives_reason"):
        manifest.pop(name, None)
    write_json(run / "ensemble.json", manifest)
    found = evaluate_run(run, progress=Progress(quiet=True))
    for row in ("map_last", "map_early_stopped"):
        assert found[row] is found["standard_errors"][row] is None
        assert found[f"{row}_reason"] == found["standard_errors"][f"{row}_reason"]
    assert found["map"]["nll"]["mean"] > 0


def test_parameters_themselves_are_shown_and_not_judged(run: Path) -> None:
    """Chains whose factors lie far apart, as LoRA's gauge lets them, may agree on everything."""
    before = figures(run / "metrics.json")["diagnostics"]
    path = run / "traces" / "part_00001.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    raw = [name for name in arrays if name.startswith("raw[")]
    assert raw
    for name in raw:
        arrays[name] = arrays[name] + 1e3 * np.arange(2.0)[:, None]
    record = read_json(run / "run.json", "run")
    record["traces"]["sha256"][path.name] = write_npz(path, arrays)
    write_json(run / "run.json", record)
    found = evaluate_run(run, progress=Progress(quiet=True))["diagnostics"]
    assert {k: found[k] for k in ("rhat_max", "ess_bulk_min", "verdict", "reason")} == {
        k: before[k] for k in ("rhat_max", "ess_bulk_min", "verdict", "reason")
    }
    assert found["quantities"][raw[0]]["rhat"] != before["quantities"][raw[0]]["rhat"]


def test_the_table_is_printed_with_standard_errors(run: Path, evaluate: Evaluate) -> None:
    _, out, _ = evaluate(run)
    found = figures(run / "metrics.json")
    nll, error = found["ensemble"]["nll"], found["standard_errors"]["ensemble"]["nll"]
    row = re.search(r"^posterior ensemble of 6 .*$", out, re.MULTILINE)
    assert row is not None
    assert f"{nll:.4f} ± {error:.4f}".replace("± 0.", "± .") in row[0]
    expected = found["calibration"]["expected_ece"]["mean"]
    assert f"A perfectly calibrated model would score ECE {expected:.4f}" in out
    assert "Enough samples: " in out
    assert "Area under risk–coverage: " in out


def test_stored_predictions_are_those_of_the_figures(run: Path, evaluate: Evaluate) -> None:
    assert evaluate(run, "--split", "shifted")[0] == 0
    for split, size in ((None, 600), ("shifted", 600)):
        p = load_predictions(run, split)
        assert (p.num_members, len(p)) == (K, size)
    folder = run / "predictions"
    shutil.copy(folder / "shifted.npz", folder / "validation.npz")
    with pytest.raises(InputError, match="predictions of split 'shifted', not 'validation'"):
        load_predictions(run)


def test_temperatures_are_fitted_on_what_was_held_out_of_train(finished: Path) -> None:
    held_out = split_off(stratified_subset(generate("train"), 40, seed=0), 0.1, seed=0)[1]
    starts = map_ensemble(finished).predict(held_out.texts[0])
    expected = [temperature_scale(logits, held_out.labels) for logits in starts.logits]
    found = figures(finished / "metrics.json")
    scaled = found["map_temperature_scaled"]["temperature"]
    assert scaled == pytest.approx(np.mean(expected), rel=1e-3)
    members = Ensemble.load(finished).predict(held_out.texts[0])
    expected = temperature_scale(np.log(members.probs), held_out.labels)
    own = found["ensemble_temperature_scaled"]["temperature"]
    assert own == pytest.approx(expected, rel=1e-3)


def test_of_many_held_out_examples_some_are_enough_for_a_temperature(finished: Path) -> None:
    config, many = load_run_config(finished), generate("train")
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    part = held_out_set(config, many, tokenizer)
    assert part is not None
    assert len(part) == MOST_HELD_OUT < len(many)
    few = held_out_set(config, many.take(np.arange(50)), tokenizer)
    assert few is not None
    assert few.examples.ids.tolist() == many.ids[:50].tolist()
    assert held_out_set(config, None, tokenizer) is None


def refused(evaluate: Evaluate, run: Path, *arguments: str) -> str:
    """One line, status 2, nothing changed."""
    before = snapshot(run)
    code, _, err = evaluate(*arguments)
    assert code == 2
    assert err.startswith("Error: ")
    assert err.count("\n") == 1, err
    assert snapshot(run) == before
    return err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--k", "7"], ["--k 7", "6 samples", "1 to 6"]),
        (["--k", "2", "--single"], ["--k 2", "--single"]),
        (["--split", "test"], ["'test'", "train, validation, shifted"]),
        (["sampler.thinn=2"], ["thinn"]),
        (["device=tpu"], ["'tpu'", "auto, cpu"]),
        *[(["--tolerance", x], [f"tolerance={x}", "between 0 and 1"]) for x in WRONG],
        (["--k", "4", "--tolerance", "0.01"], ["with 4 members", "none can be left out"]),
        (["--single", "--tolerance", "0.01"], ["with 1 members", "none can be left out"]),
    ],
)
def test_wrong_arguments(
    run: Path,
    evaluate: Evaluate,
    arguments: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--tolerance" in arguments:  # found out before any long work
        monkeypatch.setattr("bayesian_lora.experiment.evaluate.load_model", pytest.fail)
    message = refused(evaluate, run, str(run), *arguments)
    for part in parts:
        assert part in message


def test_places_without_a_run(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    empty, config = tmp_path / "empty", run.parent / "small.yaml"
    empty.mkdir()
    assert "no run there" in refused(evaluate, run, str(empty))
    assert "not found" in refused(evaluate, run, str(tmp_path / "nowhere"))
    config.write_text(SMALL.format(model="minilm", folder=tmp_path / "later"))
    message = refused(evaluate, run, str(config))
    assert "no run there yet" in message
    assert f"bayesian-lora train {config}" in message


WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        (f"samples/sample_0003/{WEIGHTS}", None, ["sample_0003", "missing"]),
        (f"samples/sample_0003/{WEIGHTS}", "flip", ["sample_0003", "sha256"]),
        (f"samples/sample_0003/{WEIGHTS}", "cut", ["sample_0003", "damaged"]),
        (f"map/chain_1/{WEIGHTS}", "flip", ["chain_1", "sha256"]),
        ("ensemble.json", None, ["ensemble.json", "not found"]),
        ("ensemble.json", "cut", ["ensemble.json", "JSON"]),
        ("run.json", None, ["run.json", "not found"]),
        ("run.json", "cut", ["run.json", "JSON"]),
        ("config.yaml", None, ["no run there", "config.yaml"]),
        ("traces/part_00001.npz", "cut", ["part_00001.npz", "damaged"]),
    ],
)
def test_damaged_files_are_named(
    run: Path, evaluate: Evaluate, name: str, change: str | None, parts: list[str]
) -> None:
    path = run / name
    data = path.read_bytes()
    if change is None:
        path.unlink()
    elif change == "cut":
        path.write_bytes(data[: len(data) * 2 // 3])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    message = refused(evaluate, run, str(run))
    for part in parts:
        assert part in message


def test_another_base_model_is_refused(
    run: Path, evaluate: Evaluate, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """The folder the run names holds other weights now."""
    other = Path(shutil.copytree(tiny_models["distilbert"], tmp_path / "model"))
    manifest = read_json(run / "ensemble.json", "ensemble")
    manifest["model"]["name"] = str(other)
    manifest["lora"]["target_modules"] = ["q_lin", "v_lin"]
    write_json(run / "ensemble.json", manifest)
    message = refused(evaluate, run, str(run))
    assert "fingerprint" in message
    assert str(other) in message
