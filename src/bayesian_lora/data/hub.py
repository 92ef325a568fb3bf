"""Reading a split of any data set that `datasets.load_dataset` loads, from the hub or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bayesian_lora.data.examples import Table, check_columns
from bayesian_lora.errors import InputError

OPTIONS = (
    "set data.dir or BAYESIAN_LORA_DATA to a local folder, use data.name=synthetic (embedded), "
    "or give your own files in data.files"
)


def read_hub(
    path: str,
    config: str | None,
    split: str,
    text_columns: Sequence[str],
    label_column: str,
    label_names: Sequence[str],
) -> Table:
    """The text and label columns of one split, its classes checked against `label_names`.

    Raises InputError when the hub cannot be reached (with what to do instead), does not have the
    data set, configuration, split or a column, orders its classes otherwise, or has no labels.
    """
    dataset = _load(path, config, split)
    source = f"{'/'.join(filter(None, (path, config)))} [{split}]"
    wanted = [*text_columns, label_column]
    check_columns(source, dataset.column_names, wanted)
    names = getattr(dataset.features[label_column], "names", None)
    if names is not None and list(names) != list(label_names):
        raise InputError(
            f"{source}: classes are {', '.join(names)} in this order, expected "
            f"{', '.join(label_names) or 'real numbers'}: correct data.label_names, or the data "
            "set has changed on the hub: use data.dir"
        )
    table = Table(source, {name: dataset[name][:] for name in wanted})
    labels = table.columns[label_column]
    if labels and all(label == -1 for label in labels):
        raise InputError(f"{source}: the split has no labels (all -1): choose another split")
    return table


def _load(path: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # load_dataset raises the errors of half a dozen libraries
        if _is_connection_error(error):
            raise InputError(
                f"the hub is not reachable, so {path} cannot be loaded: {OPTIONS}"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"data set {path!r} (configuration {config}, split {split}) cannot be loaded: {reason}"
        ) from error


def _is_connection_error(error: Exception) -> bool:
    # The libraries under `datasets` changed from requests to httpx: their names are all that lasts.
    library = type(error).__module__.partition(".")[0]
    networking = library in ("huggingface_hub", "httpx", "requests", "aiohttp")
    return networking or isinstance(error, ConnectionError | TimeoutError)
