"""What a person sees: lines where output is no terminal, a bar where it is."""

import sys

import pytest

from bayesian_lora import progress
from bayesian_lora.progress import Progress


class Clock:
    """Time that goes on by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(total: int, shown: Progress, clock: Clock) -> list[int]:
    asked: list[int] = []
    shown.start("Sampling", total)
    for done in range(1, total + 1):
        clock.now += 2.0

        def facts(done: int = done) -> str:
            asked.append(done)
            return f"loss {done}"

        shown.update(done, facts)
    shown.end()
    return asked


@pytest.mark.parametrize("total", [1, 2, 9, 10, 11, 15, 19, 20, 99, 1000, 1234])
def test_about_ten_lines_a_phase_and_always_the_last(
    total: int, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = lines_of(total, Progress(terminal=False), clock)
    assert min(total, 5) <= len(asked) <= 11
    assert asked[-1] == total
    assert len(capsys.readouterr().out.splitlines()) == len(asked)


def test_a_line_has_counts_facts_and_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines_of(1000, Progress(terminal=False), clock)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "  Sampling 100/1000 | loss 100 | 30:00 left"  # 900 steps of 2 s
    assert out[-1] == "  Sampling 1000/1000 | loss 1000 | 0:00 left"


def test_a_phase_without_steps_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(terminal=False)
    shown.start("Burn-in", 0)
    shown.end()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(
    terminal: bool, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress(quiet=True, terminal=terminal)
    assert lines_of(20, shown, clock) == []
    shown.say("a line")
    assert capsys.readouterr() == ("", "")


def test_lines_are_said_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()  # pytest's output is no terminal
    shown.say("Saved [bold]sample[/bold] 1/20: runs/[x]")
    shown.say()
    assert capsys.readouterr().out == "Saved [bold]sample[/bold] 1/20: runs/[x]\n\n"


def test_a_terminal_gets_a_bar_and_whole_lines_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "78")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    folder = "runs/[x]/" + "a_long_name_" * 6
    shown = Progress()
    assert shown.terminal
    shown.start("Sampling", 4)
    for done in range(1, 5):
        shown.update(done, lambda done=done: f"loss {done} [chain 0]")
        shown.say(f"Saved sample {done}/4: {folder}/sample_{done:04d}")
    shown.end()
    out = capsys.readouterr().out
    for done in range(1, 5):
        assert f"Saved sample {done}/4: {folder}/sample_{done:04d}\n" in out
    assert "4/4" in out
    assert "loss 4 [chain 0]" in out
    assert shown._bar is None


@pytest.mark.parametrize("terminal", [True, False])
def test_lots_move_the_bar_and_write_no_lines(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "78")
    shown = Progress(terminal=terminal)
    shown.start("Members", 10)
    shown.more(4)
    shown.more(6)
    shown.end()
    assert ("10/10" in capsys.readouterr().out) == terminal
    shown.start("Warm starts", 5)
    shown.more(1)
    shown.end()
    assert ("1/5" in capsys.readouterr().out) == terminal, "each phase counts anew"


def test_a_new_phase_closes_the_one_before() -> None:
    shown = Progress(terminal=True)
    shown.start("Burn-in", 2)
    first = shown._bar
    shown.start("Sampling", 2)
    try:
        assert shown._bar is not first
        assert first.finished is False
        assert not first.live.is_started
    finally:
        shown.end()
    shown.end()  # twice is once
