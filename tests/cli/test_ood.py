"""`eval RUN --ood NAME`: what goes not with it; the rest is in `tests/experiment/test_ood.py`."""

from pathlib import Path

import pytest

from bayesian_lora.cli import ood as command
from bayesian_lora.errors import InputError


@pytest.mark.parametrize(
    ("chosen", "option"),
    [({"k": 2}, "--k"), ({"single": True}, "--single"), ({"tolerance": 0.1}, "--tolerance")],
)
def test_the_command_refuses_a_part_of_the_members(
    chosen: dict[str, object], option: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^{option}: --ood uci takes all members"):
        command.evaluate_ood(tmp_path, "uci", split=None, chosen=chosen, data_dir=None, device=None)


def test_the_command_refuses_an_empty_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--ood is empty"):
        command.evaluate_ood(tmp_path, " ", split=None, chosen={}, data_dir=None, device=None)
