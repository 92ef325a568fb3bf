"""What a stack says of how its members came about, and which of them belong together.

Shapes: K members.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayesian_lora.composition.fit import Recipe
from bayesian_lora.composition.gates import GateOptions, train_gate
from bayesian_lora.composition.sources import Source, read_source
from bayesian_lora.composition.stack import Stack
from bayesian_lora.composition.stack_files import read_stack, write_stack
from bayesian_lora.composition.stacking import stack_sources
from bayesian_lora.progress import Progress
from tests.composition.adapters import toy_source, write_run
from tests.composition.stacks import make_data, make_stack

MODULES = {"net.layer.0.query": (9, 9)}
SGLD = {
    "name": "sgld",
    "temperature": 1.0,
    "tempering": "posterior",
    "starts": "within one mode",
    "exactness": "O(h)",
}
COLD = {**SGLD, "temperature": 0.25, "tempering": "cold", "exactness": "O(h²)"}
PLACES = ((0, 0), (1, 0), (0, 1), (1, 1))


def toys(*samplers: Any, places: Any = PLACES) -> list[Source]:
    return [
        dataclasses.replace(
            toy_source(name, MODULES, members=len(places), seed=i), sampler=sampler, places=places
        )
        for i, (name, sampler) in enumerate(zip("ab", samplers, strict=True))
    ]


def sampler_of(stack: Stack) -> dict[str, Any]:
    return stack.ensemble(next(iter(stack.tasks))).provenance.sampler


def places_of(stack: Stack) -> list[tuple[int, int]]:
    return [(r.chain, r.draw) for r in stack.ensemble(next(iter(stack.tasks))).records]


def test_what_all_parts_share_is_said_of_the_stack() -> None:
    found = sampler_of(stack_sources(toys(COLD, COLD)))
    assert (found["temperature"], found["tempering"]) == (0.25, "cold")
    assert found["starts"] == "within one mode"
    assert found["exactness"].endswith("no posterior of its own; its parts: O(h²)")


def test_what_they_do_not_share_is_said_part_by_part() -> None:
    found = sampler_of(stack_sources(toys(SGLD, COLD)))
    assert found["tempering"] == "mixed: a posterior (T = 1), b cold (T = 0.25)"
    assert found["temperature"] == 0.25
    assert found["starts"] == "within one mode"
    assert found["exactness"].endswith("mixed: a O(h), b O(h²)")


def test_adapters_that_were_not_sampled_are_no_posterior() -> None:
    found = sampler_of(stack_sources(toys(None, None)))
    assert (found["temperature"], found["tempering"]) == (0.0, "none")
    mixed = sampler_of(stack_sources(toys(SGLD, None)))
    assert mixed["tempering"] == "mixed: a posterior (T = 1), b none (T = 0)"


def test_paired_members_keep_their_chains_and_draws() -> None:
    stack = stack_sources(toys(SGLD, SGLD))
    assert places_of(stack) == list(PLACES)
    ensemble = stack.ensemble("a")
    assert ensemble.subset(2).chains.tolist() == [0, 1], "spread over chains"
    single = [toy_source("one", MODULES), toys(SGLD, SGLD)[1]]
    assert places_of(stack_sources(single)) == list(PLACES), "one adapter goes with all"


def test_members_that_share_a_chain_of_any_part_are_of_one_chain() -> None:
    sources = toys(SGLD, SGLD)
    crossed = places_of(stack_sources(sources, members="crossed"))
    assert {chain for chain, _ in crossed} == {0}
    assert len({*crossed}) == len(crossed) == 16
    alone = dataclasses.replace(sources[1], places=tuple((k, 0) for k in range(4)))
    assert places_of(stack_sources([sources[0], alone])) == list(PLACES)
    unknown = [dataclasses.replace(source, places=()) for source in sources]
    assert places_of(stack_sources(unknown)) == [(k, 0) for k in range(4)]


def test_a_stack_on_disk_says_the_same(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_models["bert"]
    for i, task in enumerate(("sst2", "mnli")):
        write_run(tmp_path / task, path, task, i, chains=2)
    stack = stack_sources([read_source(str(tmp_path / task)) for task in ("sst2", "mnli")])
    write_stack(tmp_path / "stack", stack)
    again = read_stack(tmp_path / "stack")
    assert sampler_of(again) == sampler_of(stack)
    assert places_of(again) == [(0, 0), (1, 0)]
    assert sampler_of(again)["exactness"].endswith("sgld, of unknown exactness")
    assert stack.changed(facts={"kind": "svd", "of": stack.facts}).fact("places") is not None
    start = read_source(str(tmp_path / "sst2" / "map" / "chain_0"))
    assert start.sampler is None, "a warm start is a fit"


def test_the_base_of_ensembles_is_looked_at_once_and_noted(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bayesian_lora.composition import stack_model

    path = tiny_models["bert"]
    known = make_stack(path, members=2)
    stack = known.changed(model={**known.model, "fingerprint": None})
    built: list[int] = []
    build = stack_model.build_stack_model
    monkeypatch.setattr(
        stack_model, "build_stack_model", lambda *a, **k: built.append(1) or build(*a, **k)
    )
    write_stack(tmp_path / "stack", stack)
    assert len(built) == 1
    value = json.loads((tmp_path / "stack" / "stack.json").read_text())
    assert value["model"]["fingerprint"] == known.model["fingerprint"]
    assert stack.model["fingerprint"] is None, "the stack given is as it was"


def test_a_stack_that_a_gate_has_moved_says_so(tiny_models: dict[str, Path]) -> None:
    stack, data = make_stack(tiny_models["bert"]), make_data(tiny_models["bert"], size=16)
    recipe, quiet = Recipe(epochs=1, batch_size=16), Progress(quiet=True)
    kept, moved = (
        train_gate(
            stack, data, GateOptions("layer", frozen=frozen), recipe, seed=5, progress=quiet
        ).stack
        for frozen in (True, False)
    )
    assert "retrained" not in kept.facts
    assert moved.facts["retrained"] == {
        "with": "gate",
        "seed": 5,
        "recipe": dataclasses.asdict(recipe),
    }
    assert "trained further since" in sampler_of(moved)["exactness"]
    assert "trained further" not in sampler_of(kept)["exactness"]
    np.testing.assert_array_equal(moved.weights, stack.weights)
