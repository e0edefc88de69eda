"""Word error rate: greedy CTC, no language model, corpus level."""

from collections.abc import Sequence

import jiwer
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsewav.data.batches import SpeechBatches
from sparsewav.data.tokens import collapse, write_text
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.models.processor import Processor
from sparsewav.pruning.encoder import input_key, output_counts, takes_padding
from sparsewav.pruning.hessian import Progress


@torch.inference_mode()
def transcribe(
    model: PreTrainedModel,
    processor: Processor,
    utterances: Sequence[Utterance],
    seconds_per_batch: float = 60.0,
    progress: Progress | None = None,
) -> list[str]:
    """Transcribe utterances greedily.

    Args:
        model: CTC model, which stays on its device.
        processor: Feature extractor and tokenizer of the model.
        utterances: The utterances to transcribe.
        seconds_per_batch: Limit of the audio in a batch, padding included.
        progress: Called with (batches done, batches) after every batch.

    Returns:
        A hypothesis in upper case for every utterance, in their order.
    """
    was_training = model.training
    model.eval()
    hypotheses: dict[int, str] = {}  # by position: ids may repeat
    batches = SpeechBatches(utterances, processor, seconds_per_batch, padding=takes_padding(model))
    for index, group in enumerate(batches.groups):
        hypotheses |= zip(group, decode(model, processor, batches[index]), strict=True)
        if progress:
            progress(index + 1, len(batches))
    model.train(was_training)
    return [hypotheses[position] for position in range(len(utterances))]


def decode(model: PreTrainedModel, processor: Processor, batch: dict[str, Tensor]) -> list[str]:
    """Decode one batch greedily, without padded frames."""
    audio = batch[input_key(model)].to(model.device, model.dtype)
    attention_mask = batch["attention_mask"].to(model.device)
    lengths = attention_mask.sum(-1)
    if takes_padding(model):
        logits = model(audio, attention_mask=attention_mask).logits
    else:  # the lengths are equal; an extractor may have padded all to an even number of frames
        logits = model(audio[:, : int(lengths.max())]).logits
    counts = output_counts(model, lengths).tolist()
    hypotheses = []
    for best, count in zip(logits.argmax(-1).cpu(), counts, strict=True):
        tokens = [emission.token for emission in collapse(best[:count], processor.tokenizer)]
        hypotheses.append(write_text(tokens, processor.tokenizer).upper())
    return hypotheses


def word_error_rate(utterances: Sequence[Utterance], hypotheses: Sequence[str]) -> float:
    """Give the corpus WER as a fraction, the edits of all utterances over all their reference words.

    Raises:
        UserError: There are no utterances.
    """
    if not utterances:
        raise UserError("the evaluation set is empty: a word error rate over no words is not a number")
    references = [utterance.text.upper() for utterance in utterances]
    return float(jiwer.wer(references, list(hypotheses)))
