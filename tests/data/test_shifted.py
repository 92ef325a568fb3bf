"""Sets by name or file for a task's model: what is found, which labels stay, what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest

from bayesian_lora.data import shifted
from bayesian_lora.data.glue_datasets import TASKS, load_split
from bayesian_lora.data.shifted import Shifted, load_shifted
from bayesian_lora.data.synthetic import generate
from bayesian_lora.data.tasks import custom_task
from bayesian_lora.errors import InputError

SST2, MNLI, SYNTHETIC = TASKS["sst2"], TASKS["mnli"], TASKS["synthetic"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a few rows of each set that the tests name."""
    files = {
        "glue/SST-2/dev.tsv": 'sentence\tlabel\ngood "film\t1\nbad film\t0\n',
        "glue/MNLI/dev_matched.tsv": "sentence1\tsentence2\tgold_label\na\tb\tneutral\n",
        "glue/MNLI/dev_mismatched_1k_tokenised.tsv": (
            "sentence1\tsentence2\tgold_label\nc\td\tentailment\ne\tf\tcontradiction\n"
        ),
        "glue/RTE/dev.tsv": "sentence1\tsentence2\tlabel\ng\th\tentailment\n",
        "ag_news/test.csv": '"3","Title","Some news"\n"1","Other","More"\n',
        "imdb/test.csv": "id,text,label\ntest/neg/0_2,dull,0\ntest/pos/1_9,fine,1\n",
    }
    for name, file in shifted.UCI_FILES.items():
        files[f"uci_sentiment/{file}"] = f'sentence\tlabel\n"{name}\t1\nbad {name}\t0\n'
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def labels(found: Shifted) -> list[int]:
    return found.examples.labels.tolist()


@pytest.mark.parametrize("name", ["shifted", "synthetic:shifted"])
def test_a_split_of_the_task_itself(name: str) -> None:
    found, own = load_shifted(SYNTHETIC, name, None), generate("shifted")
    assert (found.name, found.labelled, found.why) == ("shifted", True, "")
    assert found.examples.fingerprint() == own.fingerprint()
    assert found.examples.true_probs is not None


@pytest.mark.parametrize("name", ["mismatched", "mnli:mismatched"])
def test_mnli_mismatched_and_its_stand_in(name: str, folder: Path) -> None:
    told: list[str] = []
    found = load_shifted(MNLI, name, folder, told.append)
    assert (found.name, found.labelled) == ("mismatched", True)
    assert found.examples.texts == (["c", "e"], ["d", "f"])
    assert labels(found) == [0, 2]
    assert "1k_tokenised" in told[0]


def test_uci_is_all_three_files_and_each_by_its_name(folder: Path) -> None:
    whole = load_shifted(SST2, "uci", folder)
    assert (whole.name, whole.labelled) == ("uci", True)
    parts = [load_shifted(SST2, name, folder) for name in shifted.UCI_FILES]
    assert [part.name for part in parts] == ["uci_amazon", "uci_imdb", "uci_yelp"]
    assert whole.examples.texts[0] == [text for part in parts for text in part.examples.texts[0]]
    assert whole.examples.texts[0][0] == '"uci_amazon'  # quotes are ordinary characters there
    assert labels(whole) == [1, 0] * 3
    assert whole.examples.ids.tolist() == list(range(6))  # each once


@pytest.mark.parametrize(
    ("name", "called"),
    [("imdb", "imdb"), ("imdb:test", "imdb"), ("stanfordnlp/imdb", "imdb"), ("IMDB", "imdb")],
)
def test_another_task_of_the_same_classes_keeps_its_labels(
    name: str, called: str, folder: Path
) -> None:
    found = load_shifted(SST2, name, folder)  # neg and pos are negative and positive
    assert (found.name, found.labelled, labels(found)) == (called, True, [0, 1])


def test_a_split_of_another_task_is_named_after_both() -> None:
    found = load_shifted(SST2, "synthetic:shifted", None)
    assert (found.name, found.labelled) == ("synthetic_shifted", True)


def test_other_classes_leave_no_labels_and_the_reason(folder: Path) -> None:
    found = load_shifted(TASKS["imdb"], "ag_news", folder)
    assert (found.name, found.labelled, labels(found)) == ("ag_news", False, [-1, -1])
    assert found.examples.texts == (["Title Some news", "Other More"],)
    assert found.why == (
        "other label space: ag_news has World, Sports, Business, Sci/Tech, the task imdb has "
        "neg, pos"
    )


def test_known_probabilities_go_with_the_labels() -> None:
    task = custom_task("mine", text_columns=["t"], label_column="y", label_names=["a", "b"])
    found = load_shifted(task, "synthetic", None)
    assert not found.labelled
    assert found.examples.true_probs is None
    assert set(labels(found)) == {-1}


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (SST2, "mnli", "has 2 texts an example .premise and hypothesis., but the model of sst2 "),
        (MNLI, "imdb", "has 1 text an example .text., but the model of mnli reads 2"),
        (MNLI, "uci", "has 1 text an example .sentence., but the model of mnli reads 2"),
    ],
)
def test_another_number_of_texts_is_refused_with_what_to_do(
    task: shifted.TaskSpec, name: str, message: str, folder: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_shifted(task, name, folder)
    assert "name a set of as many, or a file of your own with" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uci_amazn", r"did you mean uci_amazon"),
        ("agnew", r"did you mean ag_news"),
        ("validaton", r"did you mean validation"),
        ("zzz", r"no such set: known are the splits of sst2 \(train, validation\), uci, uci_amaz"),
        ("ag_news:dev", r"split 'dev' of ag_news: must be one of train, test"),
        ("nowhere.csv", r"ood 'nowhere.csv': no such file; the path counts from "),
        ("some/file", r"ood 'some/file': no such file"),
    ],
)
def test_unknown_names(name: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_shifted(SST2, name, folder)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_file(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a folder; name a file of \.csv, \.tsv"):
        load_shifted(SST2, str(folder), None)


def test_uci_files_that_are_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match=r"not on the hub, and no local folder is given: set data"):
        load_shifted(SST2, "uci", None)
    (folder / "uci_sentiment" / "yelp_labelled.tsv").unlink()
    with pytest.raises(InputError, match=r"yelp_labelled.tsv is not there; add the file"):
        load_shifted(SST2, "uci", folder)
    assert load_shifted(SST2, "uci_imdb", folder).labelled


def write(path: Path, rows: list[list[str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("given", "expected"), [(["0", "1"], [0, 1]), (["positive", "negative"], [1, 0])]
)
def test_a_file_with_the_tasks_classes_is_labelled(
    given: list[str], expected: list[int], tmp_path: Path
) -> None:
    rows = [["label", "sentence"], *([label, f"text {label}"] for label in given)]
    found = load_shifted(SST2, write(tmp_path / "my reviews.csv", rows), None)
    assert (found.name, found.labelled) == ("my_reviews", True)
    assert labels(found) == expected
    assert found.examples.texts == ([f"text {label}" for label in given],)


def test_a_file_with_other_labels_or_none_is_read_without(tmp_path: Path) -> None:
    joy = write(tmp_path / "a.csv", [["text", "label"], ["x", "0"], ["y", "joy"]])
    found = load_shifted(SST2, joy, None)
    assert (found.labelled, labels(found)) == (False, [-1, -1])
    assert found.why.startswith(f"other label space than sst2's: {joy}:3: label 'joy' is not one ")
    bare = write(tmp_path / "b.csv", [["remark"], ["x"], ["y"]])
    found = load_shifted(SST2, bare, None)
    assert (found.labelled, found.examples.texts) == (False, (["x", "y"],))
    assert found.why == f"{bare} has no column 'label', so no labels"


def test_a_file_may_have_the_columns_of_the_official_one(tmp_path: Path) -> None:
    rows = [["genre", "sentence1", "gold_label", "sentence2"], ["x", "p", "neutral", "h"]]
    found = load_shifted(MNLI, write(tmp_path / "a.csv", rows), None)
    assert found.examples.texts == (["p"], ["h"])
    assert (found.labelled, labels(found)) == (True, [1])
    rows = [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", "p", "h"]]
    found = load_shifted(TASKS["mrpc"], write(tmp_path / "b.csv", rows), None)
    assert (found.examples.texts, labels(found)) == ((["p"], ["h"]), [1])


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"sentence": "a", "label": 0}\n{"sentence": 3, "label": 1}\n'
    )
    with pytest.raises(InputError, match=r"a.jsonl:2: sentence is 3, must be text"):
        load_shifted(SST2, str(tmp_path / "a.jsonl"), None)
    empty = write(tmp_path / "b.csv", [["sentence", "label"]])
    with pytest.raises(InputError, match="the split has no rows"):
        load_shifted(SST2, empty, None)
    two = write(tmp_path / "c.csv", [["a", "b", "label"], ["x", "y", "0"]])
    with pytest.raises(InputError, match="reads 1 text an example: name the column sentence"):
        load_shifted(SST2, two, None)


@pytest.mark.parametrize("stem", ["validation", "train", "uci", "imdb", "ag_news_train"])
def test_a_file_never_takes_the_name_of_another_set(stem: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"{stem}.csv", [["sentence", "label"], ["x", "0"]])
    assert load_shifted(SST2, path, None).name == f"file_{stem}"


def test_a_file_is_known_by_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path / "a.csv", [["sentence", "label"], ["x", "0"]]))
    monkeypatch.chdir(tmp_path)
    assert load_shifted(SST2, "a.csv", None).file == path.resolve()
    assert load_shifted(SST2, "synthetic:shifted", None).file is None


def test_names_go_before_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "uci", [["sentence", "label"], ["x", "0"]])
    assert len(load_shifted(SST2, "uci", folder).examples) == 6


def test_real_sets(real_data: Path) -> None:
    uci = load_shifted(SST2, "uci", real_data)
    assert (uci.labelled, len(uci.examples)) == (True, 3000)
    assert np.bincount(uci.examples.labels).tolist() == [1500, 1500]
    file = real_data / "uci_sentiment" / "imdb_labelled.tsv"
    by_path = load_shifted(SST2, str(file), None)
    assert by_path.examples.texts == load_shifted(SST2, "uci_imdb", real_data).examples.texts
    news = load_shifted(TASKS["imdb"], "ag_news", real_data)
    assert (news.labelled, len(news.examples)) == (False, 7600)
    mismatched = load_shifted(MNLI, "mismatched", real_data)
    assert (mismatched.labelled, len(mismatched.examples)) == (True, 1000)
    dev = real_data / "glue" / "SST-2" / "dev.tsv"
    again = load_shifted(TASKS["synthetic"], str(dev), None)
    assert again.examples.texts == load_split(SST2, "validation", data_dir=real_data).texts
