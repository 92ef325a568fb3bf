"""docs/samplers.md says what the code does, and its figure's points lie on the derived lines."""

import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesian_lora import samplers as family
from bayesian_lora.config import SAMPLERS, SamplerConfig
from bayesian_lora.samplers import ASGLD, CSGLD, PSGLD, SAMSGLD, SGHMC, SGLD, SGNHT, SAMSGLDRank1
from bayesian_lora.samplers.base import Sampler
from bayesian_lora.samplers.failures import Diverged
from bayesian_lora.samplers.flat import Scale
from bayesian_lora.verification.mutations import mutations

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "samplers.md").read_text(encoding="utf-8")
PARTS = re.split(r"^## (.+)\n", TEXT, flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[1::2], PARTS[2::2], strict=True))
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
KEY = re.compile(r"^\| `sampler\.(\w+)` \| `([^`]+)` \|", flags=re.MULTILINE)
Z = 4.0
"""Standard errors that a measured variance may lie from its line."""


def class_of(name: str) -> type[Sampler]:
    return getattr(family, family.MODULES[name])


def example(rule: type[Sampler], **own: Any) -> Sampler:
    theta = torch.zeros(2, 1, requires_grad=True)
    return rule([theta], step_size=0.1, num_examples=1, chain_dim=0, **own)


# --- The text -------------------------------------------------------------------------------


def defaults(rule: type[Sampler]) -> dict[str, Any]:
    """Every keyword's default along the class's bases, the most derived first."""
    found: dict[str, Any] = {}
    for base in rule.__mro__:
        if "__init__" in vars(base):
            for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items():
                found.setdefault(name, parameter.default)
    return found


def value_of(text: str) -> Any:
    if text in {"true", "false"}:
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def key_faults(name: str, section: str) -> list[str]:
    """What a section's key table has wrong: keys missing or foreign, defaults that differ."""
    told = {key: value_of(text) for key, text in KEY.findall(section)}
    own = {key: defaults(class_of(name))[key] for key in SAMPLERS[name]}
    faults = [f"{key}: not on one side" for key in told.keys() ^ own.keys()]
    both = told.keys() & own.keys()
    return faults + [f"{key}: {told[key]}, is {own[key]}" for key in both if told[key] != own[key]]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_section_names_every_own_key_and_its_default(name: str) -> None:
    assert key_faults(name, SECTIONS[name]) == []


def test_a_wrong_default_and_a_missing_key_are_found() -> None:
    section = SECTIONS["sghmc"]
    assert key_faults("sghmc", section.replace("`0.1`", "`0.2`")) == ["friction: 0.2, is 0.1"]
    missing = section.replace("| `sampler.friction`", "| friction")
    assert key_faults("sghmc", missing) == ["friction: not on one side"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_section_has_the_rule_the_classs_law_and_its_word(name: str) -> None:
    section = SECTIONS[name]
    for line in ("law ", "bias ", "stable ", "heat ", "**Exactness**"):
        assert line in section, line
    assert class_of(name).law in section
    assert f"`{class_of(name).exactness}`" in section.partition("**Exactness**")[2]


def test_every_word_of_exactness_is_explained() -> None:
    special = [
        example(ASGLD, anneal=False),
        example(SAMSGLD, full_batch=True),
        example(SAMSGLDRank1, u_mode="current"),
    ]
    words = {class_of(name).exactness for name in SAMPLERS} | {s.exactness for s in special}
    told = re.findall(r"^\| `([^`]+)` \|", SECTIONS["Words of exactness"], flags=re.MULTILINE)
    assert set(told) == words


def test_the_configs_other_defaults_are_as_told() -> None:
    assert f"default `{SamplerConfig().bias}`" in SECTIONS["step_size: auto"]
    assert SamplerConfig().variance_reduction is False
    for key in ("step_size: auto", "bias", "variance_reduction: true"):
        assert f"`sampler.{key}`" in TEXT


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(PYTHON[number], "samplers.md", "exec"), {})
    printed = capsys.readouterr().out.split()
    expected = {0: (1.0526, 0.04), 1: (1.0, 0.005)}  # 4 standard errors of 20,000 draws; no noise
    if number in expected:
        value, tolerance = expected[number]
        assert float(printed[0]) == pytest.approx(value, abs=tolerance)


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
    for path in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (DOCS / path).is_file(), path


# --- Figures that the text states ------------------------------------------------------------


def test_numbers_of_the_text() -> None:
    for k, steps, told in ((0.1, 100, ".27"), (1.0, 100, ".86"), (1.0, 1000, "1.00")):
        factor = example(CSGLD, cycle_steps=steps).variance_factor(0.1, k)
        assert f"{factor:.2f}".removeprefix("0") == told
        assert told in SECTIONS["csgld"]
    cycle = example(CSGLD, cycle_steps=10_000)
    assert isinstance(cycle, CSGLD)
    mean = sum(cycle.cycle.factor(t) for t in range(5_000, 10_000)) / 5_000
    assert mean == pytest.approx(0.18, abs=0.005)
    for n, row in ((3_668, (7.1, 2.2, 1.1)), (67_349, (112, 22, 3.1))):
        wider = [(1 + n * hk / 64) / (1 - hk / 2) for hk in (0.1, 0.02, 0.002)]
        assert wider == pytest.approx(row, rel=0.03)
        assert all(f"{value:g}" in SECTIONS["Minibatch heat"] for value in row)
    for own, stable, gain in (({}, 3.8, 10.0), ({"integrator": "baoab"}, 4.0, 9.5)):
        sampler = example(SGHMC, friction=0.1, **own)
        assert (sampler.stability, sampler.heat_gain) == pytest.approx((stable, gain))


# --- The figure -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sampler_laws", DOCS / "figures/sampler_laws.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def on_the_line(value: float, error: float, derived: float) -> bool:
    return abs(value - derived) < Z * error


@pytest.mark.slow
def test_figure_has_every_sampler_and_its_points_lie_on_the_lines(
    figure: ModuleType, tmp_path: Path
) -> None:
    """4,000 draws a point: a standard error of 2.2 % of the variance."""
    results = figure.draw(tmp_path / "laws.svg", chains=4_000)
    drawn = {series.sampler for group in figure.PANELS.values() for series in group}
    assert drawn == set(SAMPLERS)
    off = [
        (title, row)
        for title, group in results.items()
        for rows in group
        for row in rows
        if not on_the_line(*row[1:])
    ]
    assert off == []
    assert "</svg>" in (tmp_path / "laws.svg").read_text(encoding="utf-8")


def test_committed_figure_is_small_and_undated() -> None:
    svg = (DOCS / "figures/sampler_laws.svg").read_text(encoding="utf-8")
    assert len(svg.encode()) < 200_000
    assert "<dc:date>" not in svg


def test_a_point_of_every_line(figure: ModuleType) -> None:
    """One step size of each series; `slow` has all of them."""
    off = []
    for title, group in figure.PANELS.items():
        for series in group:
            h = figure.step_sizes(series)[3]
            value, error = figure.measure(series, h, 4_000)
            if not on_the_line(value, error, series.law(h)):
                off.append((title, series.label, value, error, series.law(h)))
    assert off == []


class NDropped(SGHMC):
    def noise_std(self, h: Scale) -> Scale:
        return math.sqrt(self.num_examples) * super().noise_std(h)


class PlainDrift(PSGLD):
    """The preconditioner is missing from the drift."""

    def shift(self, x: Tensor, scale: Scale = 1.0) -> None:
        is_drift = isinstance(scale, float) and scale < 0
        super().shift(x / self.metric(x) if is_drift else x, scale)


@pytest.mark.parametrize(
    ("title", "rule"),
    [
        ("sgld", mutations(SGLD)["noise × √½"]),
        ("sghmc, euler", NDropped),
        ("psgld (x is h·G·k, G = 2)", PlainDrift),
    ],
)
def test_the_figures_check_rejects_broken_rules(
    figure: ModuleType, title: str, rule: Callable[..., Sampler]
) -> None:
    series = figure.PANELS[title][0]
    h = figure.step_sizes(series)[2]

    def broken(theta: Tensor, h: float, seed: int) -> Sampler:
        return rule(
            [theta],
            step_size=h,
            num_examples=figure.N,
            temperature=figure.T,
            chain_dim=0,
            generators=torch.Generator().manual_seed(seed),
            **series.own,
        )

    value, error = figure.measure(series, h, 4_000)
    assert on_the_line(value, error, series.law(h))
    value, error = figure.measure(series, h, 4_000, make=broken)
    assert not on_the_line(value, error, series.law(h))


@pytest.mark.parametrize("friction", [0.1, 0.5])
def test_the_thermostat_runs_away_beyond_its_own_limit(figure: ModuleType, friction: float) -> None:
    """hk = 2(√2 − √f)²: below it the law holds, above it the friction is refused."""
    limit = figure.thermostat_limit(friction)
    assert "2(√2 − √f)²" in SECTIONS["sgnht"]

    def ratio(hk: float) -> float:
        start = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)).double()
        theta = (start * math.sqrt(figure.TARGET)).requires_grad_()
        sampler = SGNHT(
            [theta],
            step_size=hk,
            num_examples=figure.N,
            temperature=figure.T,
            friction=friction,
            chain_dim=0,
            generators=torch.Generator().manual_seed(1),
        )

        def closure() -> Tensor:
            theta.grad = theta.detach().clone()
            return 0.5 * theta.detach().square().sum(1)

        for _ in range(2_000):
            sampler.step(closure)
        return float(theta.detach().square().mean()) / figure.TARGET

    assert ratio(0.85 * limit) == pytest.approx(1.0, abs=0.09)  # 4 standard errors of 4,000 draws
    with pytest.raises(Diverged):
        ratio(1.15 * limit)
