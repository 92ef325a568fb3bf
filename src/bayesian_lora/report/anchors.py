"""What the original study of LoRA ensembling measured, with BERT-base, to stand beside ours.

Its README's tables and run summaries; the stacked figures are those of its notebook, to three
places. Keys are the names under which it logged.
"""

from collections.abc import Mapping

Figures = Mapping[str, float]

MODEL = "BERT-base, rank 1 on key, query, value"
BASELINE: Mapping[str, Figures] = {
    "sst2": {
        "train/loss": 0.3071436285972595,
        "train/acc": 0.8725202083587646,
        "val/loss": 0.3317883610725403,
        "val/acc": 0.8463302850723267,
    },
    "cola": {
        "train/loss": 0.23546119034290314,
        "train/acc": 0.9183052778244019,
        "val/loss": 0.41714978218078613,
        "val/acc": 0.8144230842590332,
    },
    "mnli": {
        "val_matched/loss/dataloader_idx_0": 0.6197290420532227,
        "val_matched/acc/dataloader_idx_0": 0.7426388263702393,
        "val_mismatched/loss/dataloader_idx_1": 0.5963663458824158,
        "val_mismatched/acc/dataloader_idx_1": 0.7571195960044861,
    },
}
STACKED: Mapping[str, Figures] = {
    "sst2": {"val/acc": 0.776, "val/loss": 0.491},
    "cola": {"val/acc": 0.737, "val/loss": 0.568},
}
TRAINED: Mapping[str, Figures] = {
    "sst2": {
        "epoch": 0,
        "lr-Adam": 0.0,
        "train/acc": 0.875,
        "train/loss": 0.37353,
        "trainer/global_step": 8415,
        "val/acc": 0.90826,
        "val/loss": 0.23744,
    },
    "cola": {
        "epoch": 0,
        "lr-Adam": 0.0003,
        "train/acc": 0.75,
        "train/loss": 0.42605,
        "trainer/global_step": 1067,
        "val/acc": 0.82019,
        "val/loss": 0.47149,
    },
}
SHARE_OF_LOSS = 0.5
"""Of the accuracy the original's stacking lost, exact stacking is to lose at most this."""
RECOVERED = 0.95
"""The share of each single adapter's accuracy that gates are to reach without task labels."""


def lost_by_stacking(data_set: str) -> float | None:
    """Accuracy the original lost by stacking, None for a data set it gives no such figure of."""
    if data_set not in STACKED:
        return None
    return BASELINE[data_set]["val/acc"] - STACKED[data_set]["val/acc"]
