"""FitHuBERT with a CTC head. Importing this module registers the class with transformers."""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCTC, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.modeling_outputs import CausalLMOutput

MODEL_TYPE = "sparsewav-fithubert"


@strict
class FitHubertConfig(Wav2Vec2Config):
    """Configuration of a wav2vec 2.0 whose last convolution turns ``time_reduction`` frames into one.

    Attributes:
        time_reduction: Number of frames that the transformer treats as one, and that are restored after it.
        restored_size: Width of the restored frames, which are the input of the CTC head.
    """

    model_type = MODEL_TYPE
    time_reduction: int = 2
    restored_size: int = 768


class Restoration(nn.Module):
    """Turns (batch, frames, width) into (batch, ``time_reduction`` x frames, ``restored_size``)."""

    def __init__(self, width: int, time_reduction: int, restored_size: int) -> None:
        super().__init__()
        self.frames = nn.ConvTranspose1d(width, width, time_reduction, stride=time_reduction)
        self.projection = nn.Linear(width, restored_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.projection(self.frames(states.transpose(1, 2)).transpose(1, 2))


class FitHubertForCTC(Wav2Vec2ForCTC):
    """wav2vec 2.0 with a transformer on fewer frames, which are restored before the CTC head."""

    config_class = FitHubertConfig

    def __init__(self, config: FitHubertConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None  # the class of wav2vec 2.0 refuses it
        self.restoration = Restoration(config.hidden_size, config.time_reduction, config.restored_size)
        self.lm_head = nn.Linear(config.restored_size, config.vocab_size)
        self.post_init()

    def _get_feat_extract_output_lengths(self, input_lengths: Any, add_adapter: bool | None = None) -> Any:
        """Give the number of frames at the CTC head."""
        return super()._get_feat_extract_output_lengths(input_lengths, add_adapter) * self.config.time_reduction

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: object,
    ) -> CausalLMOutput:
        """Give logits (batch, frames, vocabulary), and the CTC loss if there are labels."""
        outputs = self.wav2vec2(input_values, attention_mask=attention_mask, output_hidden_states=output_hidden_states)
        logits = self.lm_head(self.dropout(self.restoration(outputs.last_hidden_state)))
        loss = None
        if labels is not None:
            mask = torch.ones_like(input_values, dtype=torch.long) if attention_mask is None else attention_mask
            frames = self._get_feat_extract_output_lengths(mask.sum(-1))
            spoken = labels >= 0
            assert self.config.pad_token_id is not None
            with torch.backends.cudnn.flags(enabled=False):
                loss = F.ctc_loss(
                    logits.log_softmax(-1, dtype=torch.float32).transpose(0, 1),
                    labels.masked_select(spoken),
                    frames.long(),
                    spoken.sum(-1),
                    blank=self.config.pad_token_id,
                    reduction=self.config.ctc_loss_reduction,
                    zero_infinity=self.config.ctc_zero_infinity,
                )
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


AutoConfig.register(MODEL_TYPE, FitHubertConfig, exist_ok=True)
AutoModelForCTC.register(FitHubertConfig, FitHubertForCTC, exist_ok=True)
