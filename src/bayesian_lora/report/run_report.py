"""The report of a run: one page from the files of its folder, without its model."""

from bayesian_lora.report.page import Page
from bayesian_lora.report.run_calibration import calibration, cumulative, selective
from bayesian_lora.report.run_chains import chains
from bayesian_lora.report.run_figures import rows, summary
from bayesian_lora.report.run_files import RunFiles
from bayesian_lora.report.run_inputs import Texts, inputs, shifted
from bayesian_lora.report.run_made import made, sampler


def run_page(files: RunFiles, texts: Texts, name: str) -> Page:
    """The page of a run.

    Args:
        files: what its folder holds.
        texts: of the default split's inputs.
        name: what the run is called.
    """
    m, model = files.metrics, files.manifest.get("model") or {}
    what = files.manifest.get("sampler", {}).get("name", "?")
    k = (m.get("ensemble") or {}).get("k", "?")
    made_by = f"{k} samples by {what}" if files.sampled else f"{k} MAP fits"
    return Page(
        f"{name}: report",
        f"{model.get('base', 'A model')} on {m.get('task', 'a task')}: {made_by}, measured on "
        f"{files.split} ({m.get('n', '?')} examples).",
        [
            summary(files),
            rows(files),
            calibration(files),
            selective(files),
            cumulative(files),
            chains(files),
            shifted(files),
            inputs(files, texts),
            sampler(files),
            made(files),
        ],
        "Made by bayesian-lora from the files of the run's folder alone.",
    )
