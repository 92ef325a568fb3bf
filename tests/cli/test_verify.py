"""`bayesian-lora verify`: the table, its summary, and what counts as failing."""

from collections.abc import Callable, Iterator

import pytest

from bayesian_lora.cli import verify as command
from bayesian_lora.errors import InputError
from bayesian_lora.verification.report import Row


def run(*names: str, seed: int = 0) -> tuple[bool, list[str]]:
    lines: list[str] = []
    return command.verify(names, seed, lines.append), lines


def rows(law: str, *fine: bool) -> Callable[..., Iterator[Row]]:
    """In the place of the checks: a row for each verdict."""
    return lambda variant, seed: iter(
        Row(variant.name, law, 2.0, 3.0, 1.5, "ok" if ok else "OFF", ok) for ok in fine
    )


def test_the_table_of_a_sampler() -> None:
    passed, lines = run("sghmc")
    assert passed
    header, claim, first, *_ = lines
    assert header.split() == ["sampler", "law", "derived", "measured", "ratio", "verdict"]
    assert claim == "sghmc: Var = T/(Nk) · 1/(1 − hk/(2(2−f)))"
    assert first.split()[0] == "sghmc"
    assert first.endswith("  ok")
    assert sum("  rejected (" in line for line in lines) == 10
    assert lines[-1] == "8 checks, 8 passed, 10 mutations rejected"
    at = header.index("verdict")
    assert all(line[at - 2 : at] == "  " and line[at] != " " for line in lines[2:5])


def test_one_check_that_fails_fails_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "check_rows", rows("a law", True, False))
    monkeypatch.setattr(command, "mutation_rows", rows("broken: so", True))
    passed, lines = run("sgld")
    assert not passed
    assert lines[-1] == "2 checks, 1 passed, 1 mutations rejected; 1 FAILED"
    assert lines[3].split() == ["sgld", "a", "law", "2", "3", "1.5000", "OFF"]


def test_a_mutation_that_passes_fails_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "check_rows", rows("a law", True))
    monkeypatch.setattr(command, "mutation_rows", rows("broken: so", True, False))
    passed, lines = run("sgld")
    assert not passed
    assert lines[-1] == "1 checks, 1 passed, 1 mutations rejected; 1 FAILED"


def test_without_names_all_variants_have_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "check_rows", rows("a law", True))
    monkeypatch.setattr(command, "mutation_rows", rows("broken: so", True))
    passed, lines = run()
    assert passed
    for name in ("sgld", "psgld", "asgld", "asgld anneal=false", "sghmc", "sghmc baoab", "sgnht"):
        assert any(line.startswith(f"{name}: ") for line in lines)
    for name in ("csgld", "sam_sgld", "sam_sgld_rank1", "sam_sgld_rank1 cross_chain"):
        assert any(line.startswith(f"{name}: ") for line in lines)
    assert lines[-1] == "12 checks, 12 passed, 12 mutations rejected"


def test_an_unknown_sampler_ends_it_before_anything_runs() -> None:
    lines: list[str] = []
    with pytest.raises(InputError, match="did you mean sghmc"):
        command.verify(["sgld", "sghcm"], 0, lines.append)
    assert lines == []


@pytest.mark.slow
def test_everything_passes() -> None:
    passed, lines = run()
    assert passed, [line for line in lines if "OFF" in line or "NOT" in line]
    assert lines[-1] == "48 checks, 48 passed, 50 mutations rejected"
