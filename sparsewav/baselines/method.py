"""What a compression method takes, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from sparsewav.data.utterances import Utterance
from sparsewav.models.processor import Processor
from sparsewav.pruning.hessian import Progress


@dataclass
class CompressionReport:
    """What a method did.

    Attributes:
        updates: Number of optimizer steps over all phases of the method.
        batch_size: Utterances in an update.
        masked: Whether the fine-tuning that follows keeps the zeros.
        log: The trainer's log; every entry has ``phase``, update and loss.
        warnings: Sentences for the user.
        facts: Further plain values for the run's record, by name.
    """

    updates: int
    batch_size: int
    masked: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A compression method."""

    def __call__(
        self,
        dense: PreTrainedModel,
        processor: Processor,
        training_set: Sequence[Utterance],
        settings: Any,
        folder: Path,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> tuple[PreTrainedModel, CompressionReport]:
        """Make a smaller model out of a dense one.

        Args:
            dense: CTC model on the device to work on. The method may change it and leave it unusable.
            processor: Feature extractor and tokenizer of the model.
            training_set: Utterances to learn from. Task-agnostic methods ignore the transcripts.
            settings: The method's own dataclass; its numbers of updates are already divided.
            folder: Where checkpoints are written. An interrupted compression resumes from them.
            seed: Seed of new weights, order of the data and dropout.
            progress: Called with (updates done, updates) after every update.

        Returns:
            A CTC model that ``save_pretrained`` and ``AutoModelForCTC.from_pretrained`` reproduce exactly (a class of
            this package is registered with transformers), and the report.

        Raises:
            UserError: The method cannot be applied to this model.
        """
