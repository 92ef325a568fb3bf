"""What is refused before a run begins, and what `prepare` hands to it.

Shapes: M chains.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bayesian_lora.cli.main import main
from bayesian_lora.config import Config, build_config, dump_run_config
from bayesian_lora.errors import InputError
from bayesian_lora.experiment.setup import (
    data_folder,
    prepare,
    resolve_device,
    run_facts,
    task_of,
)
from bayesian_lora.progress import Progress

SMALL = """\
data: {{name: synthetic, train_examples: 40, batch_size: 8, max_length: 48}}
model: {{name: {model}, lora: {{rank: 2, alpha: 4.0}}}}
train: {{epochs: 1}}
sampler: {{burn_in: 2, thin: 2, num_samples: 4, chains: 2}}
"""
HEADER = "sentence\tlabel\n"
GOOD = HEADER + "a fine film\t1\na dull film\t0\n"


@pytest.fixture(autouse=True)
def no_local_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAYESIAN_LORA_DATA", raising=False)


@pytest.fixture
def config_file(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(model=tiny_models["bert"]))
    return path


Refused = Callable[..., str]


@pytest.fixture
def refused(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `train`, check that it ends as bad input does, and give the message."""

    def run(*overrides: str, config: Path = config_file, output: str = "run") -> str:
        before = sorted(tmp_path.rglob("*"))
        keys = [f"output.dir={tmp_path / output}", *overrides]
        with pytest.raises(SystemExit) as ended:
            main(["train", str(config), *keys])
        err = capsys.readouterr().err
        assert ended.value.code == 2
        assert err.startswith("Error: ")
        assert err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sampler.stepsize=1", ["stepsize", "step_size"]),
        ("sampler.step_size=-1", ["sampler.step_size", "-1", "greater than 0"]),
        ("sampler.step_size=fast", ["sampler.step_size", "fast"]),
        ("sampler.thin=0", ["sampler.thin", "greater than or equal to 1"]),
        ("sampler.num_samples=5", ["num_samples=5", "chains=2", "num_samples=6"]),
        ("sampler.name=sgdl", ["sgdl", "sgld"]),
        ("sampler.sigma_dir=-1", ["sampler.sigma_dir", "greater than -1"]),
        ("model.lora.rank=0", ["model.lora.rank", "greater than or equal to 1"]),
        ("model.lora.rank=two", ["model.lora.rank", "two"]),
        ("model.lora.target_modules=[quary]", ["'quary'", "attention.self.query"]),
        ("model.name=no/such-model", ["no/such-model", "minilm", "bert-base-uncased", "hub"]),
        ("data.max_length=65", ["max_length=65", "at most 64"]),
        ("data.name=ssst2", ["ssst2", "did you mean sst2", "mrpc"]),
        ("data.name=sst2", ["hub is not reachable", "BAYESIAN_LORA_DATA", "synthetic"]),
        ("data.train_examples=5000", ["data.train_examples=5000", "has 4000"]),
        ("data.dir=no/such/folder", ["data.dir='no/such/folder'", "not a folder"]),
        ("device=tpu", ["'tpu'", "auto, cpu, cuda"]),
        ("device=cuda:99", ["cuda:99", "device=auto"]),
    ],
)
def test_a_wrong_value_is_one_line(refused: Refused, override: str, parts: list[str]) -> None:
    message = refused(override)
    for part in parts:
        assert part in message


def test_roberta_reads_two_tokens_less_than_it_has_positions(
    refused: Refused, tiny_models: dict[str, Path]
) -> None:
    keys = f"model.name={tiny_models['roberta']}", "data.max_length=65"
    assert "at most 64" in refused(*keys)  # of 66 positions


def test_a_missing_or_broken_config_is_one_line(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(config=tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: {name: [")
    assert "not a readable YAML" in refused(config=broken)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({}, ["glue/SST-2/train.tsv"]),
        ({"train": GOOD}, ["glue/SST-2/dev.tsv"]),
        ({"train": GOOD + "lost label\n", "dev": GOOD}, ["train.tsv:4", "1 fields", "2 expected"]),
        ({"train": GOOD, "dev": GOOD + "odd\t2\n"}, ["dev.tsv:4", "'2'", "positive"]),
        ({"train": GOOD, "dev": HEADER}, ["dev.tsv", "no rows"]),
        ({"train": GOOD, "dev": ""}, ["dev.tsv", "empty"]),
        ({"train": "text\tlabel\nfine\t1\n", "dev": GOOD}, ["train.tsv", "'sentence'", "text"]),
    ],
)
def test_wrong_data_names_the_file_and_the_line(
    refused: Refused, tmp_path: Path, files: dict[str, str], parts: list[str]
) -> None:
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for split, text in files.items():
        (folder / f"{split}.tsv").write_text(text)
    message = refused("data.name=sst2", f"data.dir={tmp_path}", "data.train_examples=null")
    for part in parts:
        assert part in message


def test_an_output_folder_in_use_is_left_alone(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"status": "finished"}')
    (tmp_path / "other" / "config.yaml").write_text(dump_run_config(build_config({"seed": 7})))
    message = refused(output="other")
    for part in ("run (finished)", "seed: 7 there, 0 here", "output.dir=", "output.overwrite=true"):
        assert part in message
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear …")
    assert "holds other files" in refused(output="letters")
    assert "holds other files" in refused("output.overwrite=true", output="letters")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(output="file")
    assert "is a file" in refused(output="file/run")


def test_a_run_that_cannot_be_replaced_is_kept(refused: Refused, tmp_path: Path) -> None:
    """Overwriting happens after everything else was found right."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "finished"}')
    assert "quary" in refused("output.overwrite=true", "model.lora.target_modules=[quary]")
    assert (tmp_path / "run" / "run.json").read_text() == '{"status": "finished"}'


def small(model: Path, *overrides: str) -> Config:
    lora = {"rank": 2, "alpha": 4.0}
    data = {"name": "synthetic", "train_examples": 40, "max_length": 48, "batch_size": 8}
    raw = {"data": data, "model": {"name": str(model), "lora": lora}, "sampler": {"chains": 2}}
    return build_config(raw, overrides)


def test_prepare_gives_what_the_config_asks_for(tiny_models: dict[str, Path]) -> None:
    keys = ("sampler.chains=4", "prior.std=0.2", "prior.head_std=0.5", "train.micro_batch=3")
    config = small(tiny_models["distilbert"], *keys)
    setup = prepare(config, Progress(quiet=True))
    assert setup.model.num_chains == 4
    assert (len(setup.train), len(setup.validation or ()), len(setup.evaluation)) == (36, 4, 600)
    assert setup.objective.micro_batch == 3
    assert [group.std for group in setup.groups] == [0.2, 0.5]
    heads = {id(p) for layer in setup.model.head_layers().values() for p in layer.parameters()}
    assert {id(t) for t in setup.groups[1].tensors} == heads
    states = [tuple(g.get_state().tolist()) for g in setup.streams.all()]
    assert len(set(states)) == len(states) >= 4 * 4, "two streams share their draws"


def test_shared_starts_fit_one_chain(tiny_models: dict[str, Path]) -> None:
    setup = prepare(small(tiny_models["bert"], "train.starts=shared"), Progress(quiet=True))
    assert setup.model.num_chains == 1
    assert len(setup.streams.noise) == 2


def test_facts_change_with_data_and_base(tiny_models: dict[str, Path]) -> None:
    model = tiny_models["bert"]
    runs = [small(model), small(model, "seed=1"), small(tiny_models["distilbert"])]
    facts = [run_facts(prepare(config, Progress(quiet=True))) for config in runs]
    again = run_facts(prepare(small(model), Progress(quiet=True)))
    assert facts[0] == again
    data = [f["data"]["fingerprint"] for f in facts]
    assert data[0]["train"] != data[1]["train"]
    assert data[0] == data[2]
    bases = [f["model_fingerprint"] for f in facts]
    assert bases[0] == bases[1] != bases[2]


def test_regression_heads_begin_at_the_labels_mean(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "scores.jsonl"
    rows = [f'{{"text": "the food was good", "score": {40 + i % 3}}}' for i in range(20)]
    path.write_text("\n".join(rows))
    data = {"name": "mine", "text_columns": ["text"], "label_column": "score", "regression": True}
    files = {"train": str(path), "validation": str(path)}
    for family, head in (("bert", "classifier"), ("roberta", "classifier.out_proj")):
        raw = {
            "data": {**data, "files": files, "max_length": 48, "validation_share": 0},
            "model": {"name": str(tiny_models[family])},
        }
        setup = prepare(build_config(raw), Progress(quiet=True))
        bias = setup.model.head_layers()[head].bias
        assert bias is not None
        assert bias.shape == (4, 1)
        torch.testing.assert_close(bias.detach(), torch.full((4, 1), 40.95))


def test_a_task_is_of_the_registry_or_described_by_its_columns() -> None:
    assert task_of(build_config({"data": {"name": "SST-2"}})).name == "sst2"
    raw = {"name": "someone/reviews", "text_columns": ["t"], "label_names": ["no", "yes"]}
    task = task_of(build_config({"data": raw}))
    assert (task.name, task.hub_path, task.num_labels) == ("someone/reviews", "someone/reviews", 2)
    with pytest.raises(InputError, match=r"data\.label_names"):
        task_of(build_config({"data": {"name": "x", "files": {"train": "a.csv"}}}))


def test_data_folder_prefers_the_config_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    assert data_folder(build_config({})) is None
    monkeypatch.setenv("BAYESIAN_LORA_DATA", str(other))
    assert data_folder(build_config({})) == other
    assert data_folder(build_config({"data": {"dir": str(own)}})) == own
    monkeypatch.setenv("BAYESIAN_LORA_DATA", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"BAYESIAN_LORA_DATA=.*gone"):
        data_folder(build_config({}))


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_devices_that_are_there(name: str) -> None:
    assert resolve_device(name).type in {"cpu", "cuda", "mps"}


@pytest.mark.parametrize("name", ["cuda:x", "gpu", "cpu:7", ""])
def test_devices_that_are_not(name: str) -> None:
    with pytest.raises(InputError, match="device="):
        resolve_device(name)
