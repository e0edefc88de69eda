"""The methods that the paper compares with: each takes a dense CTC model and gives a smaller one.

A method is the function ``compress`` of a module of its own, a schema in :mod:`sparsewav.settings.baselines`, a file in
``conf/method``, and a line in :data:`METHODS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, Wav2Vec2Processor

from sparsewav.data.utterances import Utterance


@dataclass
class CompressionReport:
    """What a method did.

    Attributes:
        updates: optimizer steps, over all its phases.
        batch_size: utterances of an update.
        masked: its zeros stay zero in the fine-tuning that follows.
        log: of the trainer; each entry has ``phase``, update and loss.
        warnings: sentences for the user.
        facts: more that the run's record should have, by name: plain values.
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
        processor: Wav2Vec2Processor,
        training_set: Sequence[Utterance],
        settings: Any,
        folder: Path,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[PreTrainedModel, CompressionReport]:
        """Make a smaller model out of a dense one.

        Args:
            dense: CTC model, on the device to work on; it may be changed, and need not be good for anything afterwards.
            processor: its feature extractor and tokenizer.
            training_set: utterances to learn from; task-agnostic methods do not look at their transcripts.
            settings: the method's own dataclass, its updates shortened already.
            folder: for checkpoints; a killed compression goes on from what lies there.
            seed: of new weights, order and dropout.
            progress: called with (updates done, updates) after every update.

        Returns:
            A CTC model that ``save_pretrained`` and ``AutoModelForCTC.from_pretrained`` carry over without loss (its
            own class registered with transformers where need be), and what was done.

        Raises:
            UserError: the method cannot be applied to this model.
        """


from sparsewav.baselines import deep_vs_wide, distilhubert, fithubert, l0, magnitude, parp  # noqa: E402

METHODS: dict[str, Method] = {
    "distilhubert": distilhubert.compress,
    "fithubert": fithubert.compress,
    "deep_vs_wide": deep_vs_wide.compress,
    "dphubert": l0.compress,
    "dpwavlm": l0.compress,
    "wang2023": l0.compress,
    "l0_finetune": l0.compress,
    "magnitude": magnitude.compress,
    "parp": parp.compress,
    "parp_p": parp.compress,
}
"""By the name that ``method.name`` has."""
