"""The registry, and loading from the embedded data, a data folder and one's own files."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora.data.glue_datasets import TASKS, get_task, load_split
from bayesian_lora.errors import InputError

# task, split -> rows, class balance (None: not documented), as in the data folder's README.
REAL: dict[tuple[str, str], tuple[int, list[int] | None]] = {
    ("sst2", "train"): (67_349, [29_780, 37_569]),
    ("sst2", "validation"): (872, None),
    ("cola", "train"): (8_551, [2_528, 6_023]),
    ("cola", "validation"): (1_043, None),
    ("mnli", "train"): (12_923, [4_375, 4_284, 4_264]),
    ("mnli", "matched"): (9_815, [3_479, 3_123, 3_213]),
    ("mnli", "mismatched"): (1_000, None),
    ("mrpc", "train"): (3_668, [1_194, 2_474]),
    ("mrpc", "validation"): (408, None),
    ("qnli", "train"): (9_999, [5_027, 4_972]),
    ("qnli", "validation"): (5_463, None),
    ("rte", "train"): (2_490, [1_249, 1_241]),
    ("rte", "validation"): (277, None),
    ("stsb", "train"): (5_749, None),
    ("stsb", "validation"): (1_500, None),
    ("imdb", "train"): (10_000, [5_000, 5_000]),
    ("imdb", "test"): (25_000, [12_500, 12_500]),
    ("ag_news", "train"): (13_649, [3_409, 3_439, 3_437, 3_364]),
    ("ag_news", "test"): (7_600, [1_900, 1_900, 1_900, 1_900]),
}


def test_the_registry_is_consistent() -> None:
    assert list(TASKS) == [
        *("sst2", "cola", "mnli", "mrpc", "qnli", "rte", "stsb", "imdb", "ag_news", "synthetic")
    ]
    for name, task in TASKS.items():
        assert task.name == name
        assert "train" in task.splits
        assert task.default_split in task.splits
        assert task.default_split != "train"
        assert (task.likelihood == "gaussian") == (task.label_names == ()) == (name == "stsb")
        assert task.num_labels == (len(task.label_names) or 1)
        assert set(task.metrics) <= {"accuracy", "f1", "mcc", "pearson", "spearman"}
        assert task.local is None or set(task.local.files) == set(task.splits)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *(("SST-2", "sst2"), ("sst_2", "sst2"), ("glue/sst2", "sst2"), ("GLUE/SST-2", "sst2")),
        *(("sts-b", "stsb"), ("STS-B", "stsb"), ("CoLA", "cola"), ("MNLI", "mnli")),
        *(("agnews", "ag_news"), ("AG News", "ag_news"), ("fancyzhx/ag_news", "ag_news")),
        *(("IMDB", "imdb"), ("stanfordnlp/imdb", "imdb"), ("Synthetic", "synthetic")),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert get_task(alias) is TASKS[name]


def test_an_unknown_task_names_the_nearest_the_known_and_the_way_out() -> None:
    with pytest.raises(InputError) as raised:
        get_task("sst-5")
    message = str(raised.value)
    assert "data.name 'sst-5' is unknown: did you mean sst2" in message
    assert all(name in message for name in TASKS)
    assert "data.text_columns" in message


@pytest.mark.parametrize("name", ["someone/imdb", "nyu-mll/glue", "", "xyzzy"])
def test_another_data_set_is_never_taken_for_a_known_task(name: str) -> None:
    with pytest.raises(InputError, match="is unknown"):
        get_task(name)


@pytest.mark.parametrize(("name", "split"), REAL)
def test_rows_and_class_balance_of_the_real_data(name: str, split: str, real_data: Path) -> None:
    rows, balance = REAL[name, split]
    task = get_task(name)
    notes: list[str] = []
    examples = load_split(task, split, data_dir=real_data, notify=notes.append)
    assert len(examples) == rows
    assert len(examples.texts) == len(task.text_columns)
    assert examples.ids.tolist() == list(range(rows))
    if balance is not None:
        assert np.bincount(examples.labels).tolist() == balance
    if name == "stsb":
        assert examples.labels.dtype == np.float32
        assert (examples.labels.min(), examples.labels.max()) == (0, 5)
    else:
        assert set(examples.labels.tolist()) == set(range(task.num_labels))
    tokenised = (name, split) == ("mnli", "mismatched")
    has_official = (real_data / "glue/MNLI/dev_mismatched.tsv").is_file()
    assert len(notes) == (tokenised and not has_official)


def test_all_real_splits_are_covered() -> None:
    assert set(REAL) == {
        (name, split)
        for name, task in TASKS.items()
        for split in task.splits
        if name != "synthetic"
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_imdb_texts_stay_whole_and_raw(split: str, real_data: Path) -> None:
    (texts,) = load_split(get_task("imdb"), split, data_dir=real_data).texts
    raw = (real_data / "imdb" / f"{split}.csv").read_bytes().decode()
    for mark in ("\x85", "<br />"):
        assert sum(text.count(mark) for text in texts) == raw.count(mark) > 0


@pytest.mark.parametrize("name", ["sst2", "cola", "mrpc", "rte", "qnli", "stsb"])
def test_glue_texts_stay_exactly_as_in_the_file(name: str, real_data: Path) -> None:
    task = get_task(name)
    assert task.local is not None
    examples = load_split(task, "validation", data_dir=real_data)
    raw = (real_data / task.local.files["validation"][0]).read_bytes().decode()
    fields = Counter(field for line in raw.split("\n") for field in line.split("\t"))
    texts = [text for column in examples.texts for text in column]
    assert all(text in fields for text in texts)
    assert sum('"' in text for text in texts) == sum('"' in t for t in fields.elements())


def write(root: Path, name: str, content: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


# task, file, split, content (official headers), texts, labels
OFFICIAL = [
    (
        "sst2",
        "SST-2/dev.tsv",
        "validation",
        'sentence\tlabel\n"a \t1\nb\t0\n',
        (['"a ', "b"],),
        [1, 0],
    ),
    ("cola", "CoLA/train.tsv", "train", "gj04\t1\t\ta\ngj04\t0\t*\tb\n", (["a", "b"],), [1, 0]),
    (
        "mnli",
        "MNLI/dev_mismatched.tsv",
        "mismatched",
        "index\tpromptID\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\tg\t(p)\tp0\th0\tneutral\tcontradiction\n"
        "1\t1\tg\t(p)\tp1\th1\tneutral\tentailment\n"
        "2\t1\tg\t(p)\tp2\th2\tentailment\tneutral\n",
        (["p0", "p1", "p2"], ["h0", "h1", "h2"]),
        [2, 0, 1],
    ),
    (
        "mrpc",
        "MRPC/dev.tsv",
        "validation",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n0\t7\t8\tc\td\n",
        (["a", "c"], ["b", "d"]),
        [1, 0],
    ),
    (
        "qnli",
        "QNLI/dev.tsv",
        "validation",
        "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n1\tq\ts\tentailment\n",
        (["q", "q"], ["s", "s"]),
        [1, 0],
    ),
    (
        "rte",
        "RTE/train.tsv",
        "train",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
        (["a", "c"], ["b", "d"]),
        [0, 1],
    ),
    (
        "stsb",
        "STS-B/train.tsv",
        "train",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\t1\tn\tn\ta\tb\t5.000\n1\tg\tf\ty\t1\tn\tn\tc\td\t0.4\n",
        (["a", "c"], ["b", "d"]),
        [5.0, np.float32(0.4)],
    ),
]


@pytest.mark.parametrize(("name", "file", "split", "content", "texts", "labels"), OFFICIAL)
def test_official_glue_files(
    name: str, file: str, split: str, content: str, texts: tuple, labels: list, tmp_path: Path
) -> None:
    write(tmp_path, f"glue/{file}", content)
    notes: list[str] = []
    examples = load_split(get_task(name), split, data_dir=tmp_path, notify=notes.append)
    assert examples.texts == texts
    assert examples.labels.tolist() == labels
    assert notes == []


def test_ag_news_and_imdb_files(tmp_path: Path) -> None:
    write(tmp_path, "ag_news/test.csv", '"4","T"," d ""q"""\n"1","U","e\\f"\n')
    examples = load_split(get_task("ag_news"), "test", data_dir=tmp_path)
    assert examples.texts == (['T  d "q"', "U e\\f"],)
    assert examples.labels.tolist() == [3, 0]
    write(tmp_path, "imdb/train.csv", 'id,text,label\ntrain/pos/0_9,"a<br />\x85b",1\nx,c,0\n')
    examples = load_split(get_task("imdb"), "train", data_dir=tmp_path)
    assert examples.texts == (["a<br />\x85b", "c"],)
    assert examples.labels.tolist() == [1, 0]


def test_ag_news_classes_count_from_one_in_the_files(tmp_path: Path) -> None:
    write(tmp_path, "ag_news/test.csv", '"0","T","d"\n')
    with pytest.raises(InputError, match=r"test\.csv:1: label '0' is not one of 1, 2, 3, 4"):
        load_split(get_task("ag_news"), "test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\na\t1\nb\t2\n", r"dev\.tsv:3: label '2' is not one of negative, pos"),
        ("sentence\tlabel\na\t-\n", r"dev\.tsv:2: label '-' is not one of"),
        ("sentence\tlabel\n", r"dev\.tsv: the split has no rows"),
        ("", r"dev\.tsv: the file is empty"),
        ("sentence\na\n", r"no column 'label', columns found: sentence"),
        ("sentence\tlabel\na\n", r"dev\.tsv:2: 1 fields found, 2 expected"),
    ],
)
def test_a_bad_file_in_the_data_folder(content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, "glue/SST-2/dev.tsv", content)
    with pytest.raises(InputError, match=message):
        load_split(get_task("sst2"), "validation", data_dir=tmp_path)


def test_a_score_outside_zero_to_five(tmp_path: Path) -> None:
    write(tmp_path, "glue/STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t5.5\n")
    with pytest.raises(InputError, match=r"dev\.tsv:2: label '5\.5' is not a number from 0 to 5"):
        load_split(get_task("stsb"), "validation", data_dir=tmp_path)


def test_a_missing_file_names_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        load_split(get_task("sst2"), "train", data_dir=tmp_path)
    assert f"data.dir {tmp_path} has no glue/SST-2/train.tsv" in str(raised.value)


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_split_lists_those_of_the_task(name: str) -> None:
    known = ", ".join(TASKS[name].splits)
    with pytest.raises(InputError, match=f"split 'dev' of {name}: must be one of {known}$"):
        load_split(get_task(name), "dev")


def test_synthetic_is_embedded_and_follows_the_seed(tmp_path: Path) -> None:
    task = get_task("synthetic")
    first, again, other = (
        load_split(task, "validation", data_dir=tmp_path, seed=seed) for seed in (1, 1, 2)
    )
    assert len(first.texts) == len(task.text_columns)
    assert first.true_probs is not None
    assert first.true_probs.shape == (len(first), task.num_labels)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_reading_files_needs_no_heavy_import() -> None:
    program = (
        "import sys, bayesian_lora.data.glue_datasets as g\n"
        "g.load_split(g.get_task('synthetic'), 'validation')\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
