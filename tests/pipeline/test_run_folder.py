"""What a run leaves in its folder."""

from pathlib import Path

import pytest
import torch

from sparsewav.errors import UserError
from sparsewav.models.load import load_speech_model
from sparsewav.pipeline import run_folder


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_model_with_a_number_that_is_not_finite_is_not_written(
    model_folder: Path, tmp_path: Path, value: float
) -> None:
    speech = load_speech_model(str(model_folder))
    with torch.no_grad():
        speech.model.lm_head.bias[2] = value
    with (
        pytest.raises(UserError, match=r"model was not written: lm_head\.bias has numbers that are not finite"),
        run_folder.write_model(tmp_path / "model", speech.model, speech.processor),
    ):
        pass
    assert not list(tmp_path.iterdir())
