"""The configuration of a run and of a training: what ``conf/`` may hold."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from sparsewav.errors import UserError
from sparsewav.settings.baselines import METHODS, OURS, Method
from sparsewav.settings.data import (
    Data,
    DemoData,
    HuggingFace,
    LibriSpeechFolder,
    LibriSpeechHub,
    Manifest,
    subset_faults,
)
from sparsewav.settings.options import Option, Settings, group_faults, option
from sparsewav.settings.pruning import (
    OPTIONS,
    TRANSFORMER,
    Calibration,
    Hutchinson,
    Megabytes,
    Pruning,
    Structured,
    Uniform,
    Unstructured,
    alpha_faults,
)
from sparsewav.settings.quantization import Integers
from sparsewav.settings.recovery import Elsa, Global
from sparsewav.settings.training import STRATEGIES, FinetuneStrategy, NoFinetuning, OnePass, Progressive, Training


@dataclass
class Model(Settings):
    """Which model is pruned."""

    name_or_path: str = option("demo", "demo, another model of the demo's, a folder, or a name on the hub")
    revision: str | None = option(None, "branch, tag or commit of a name on the hub; null: its main branch")
    fairseq_checkpoint: str | None = option(None, "a file that fairseq saved, taken in place of name_or_path")
    offload: bool = option(False, "prune from disk with one transformer layer in memory at a time")

    @property
    def source(self) -> str:
        """What the model is loaded from, as the user named it."""
        return self.fairseq_checkpoint or self.name_or_path

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.fairseq_checkpoint and self.revision:
            yield f"revision={self.revision} is of a name on the hub; leave it out beside model.fairseq_checkpoint"


@dataclass
class Tracker(Option):
    """Results go to the run's folder alone."""

    name: str = field(default="none", init=False)


@dataclass
class Wandb(Tracker):
    """Weights & Biases: configuration, metrics, the per-matrix table and transcripts of every run."""

    name: str = field(default="wandb", init=False)
    project: str = option("sparsewav", "as wandb.init takes it")
    entity: str | None = option(None, "as wandb.init takes it")
    group: str | None = option(None, "as wandb.init takes it; null: the experiment's or the sweep's name")
    mode: str | None = option(
        None, "online, offline or disabled; null: $WANDB_MODE, or online", choices=("online", "offline", "disabled")
    )


@dataclass
class Export(Settings):
    """In which format the pruned model is written beside the plain checkpoint ``model/``."""

    format: str = option(
        "dense",
        "bitmask: model-bitmask/, without the zeros, and in few bits what was rounded",
        choices=("dense", "bitmask"),
    )
    dtype: str = option(
        "model",
        "model (the numbers as they are) or float16 (half the bytes; not for a rounded model as bitmask)",
        choices=("model", "float16"),
    )


@dataclass
class Config(Pruning):
    """One run."""

    model: Model = option(Model, "which model is pruned")
    data: Data = option(DemoData, "which speech is read")
    finetune_strategy: FinetuneStrategy = option(NoFinetuning, "whether and when the pruned model is tuned")
    training: Training = option(Training, "how the fine-tuning trains")
    method: Method = option(Method, "ours, or a baseline, whose fine-tuning is as long as ours")
    tracker: Tracker = option(Tracker, "where results go besides the run's folder", identifies=False)
    update_divisor: float = option(1000.0, "a baseline's published numbers of updates are divided by it", least=1)
    lr_multiplier: float = option(4.0, "a baseline's published learning rates are multiplied by it", above=0)
    device: str = option("auto", "auto (the GPU if there is one), cpu, cuda, cuda:1", identifies=False)
    seconds_per_batch: float = option(60.0, "most audio in one batch in seconds, padding included", above=0)
    output_root: str = option("outputs", "folder of the runs' folders", identifies=False)
    cache: bool = option(True, "keep Hessians, sensitivities and the dense WER between runs", identifies=False)
    force: bool = option(False, "redo a run that is done", identifies=False)
    save_model: bool = option(True, "keep the pruned model, and not its figures alone", identifies=False)
    export: Export = option(Export, "format of the weights beside model/", identifies=False)

    @property
    def stages(self) -> list[float | None]:
        """The sparsities at which the model is pruned, one after the other; the last is the target.

        It is None alone where the allocation finds the sparsity. With ``sparsity=structured`` it is the share of the
        dense encoder's parameters or multiply-accumulates that is removed.
        """
        target = self.sparsity.fraction
        strategy = self.finetune_strategy
        early = strategy.stages if isinstance(strategy, Progressive) and target is not None else []
        return [*(stage for stage in early if target is not None and stage < target), target]

    @property
    def recovers_globally(self) -> bool:
        """Whether the whole pruned model learns the dense model's outputs; a baseline has no recovery."""
        return self.method.name == OURS and isinstance(self.recovery, Global)

    @property
    def weights_format(self) -> str:
        """In which format the weights are written beside ``model/``; a budget in bytes is that of a bitmask file."""
        return "bitmask" if isinstance(self.sparsity, Megabytes) else self.export.format

    def pruning(self, sparsity: float | None) -> Pruning:
        """Give the settings of pruning alone, for a stage at some sparsity."""
        values = {item.name: getattr(self, item.name) for item in fields(Pruning)}
        if not self.sparsity.pattern and sparsity is not None:
            asked = self.sparsity
            values["sparsity"] = (
                asked.keeping(1 - sparsity) if isinstance(asked, Structured) else Unstructured(sparsity)
            )
        return Pruning(**values)

    @property
    def roles(self) -> list[str]:
        """What this run reads speech for, as in :data:`~sparsewav.settings.data.ROLES`."""
        ours = self.method.name == OURS
        learns = self.finetune_strategy.name != "none" or not ours
        return ["evaluation", *(["calibration"] if ours else []), *(["training"] if learns else [])]

    def faults(self) -> Iterator[str]:
        yield from group_faults(self)
        yield from subset_faults(self.data, self.roles)
        if self.method.name == OURS:  # a baseline reads none of these choices
            yield from self.choice_faults()
        yield from device_faults(self.device)
        if self.model.offload:
            yield from self._offload_faults()
        if isinstance(self.sparsity, Megabytes) and self.export.dtype != "model":
            yield (
                f"export.dtype={self.export.dtype} would change the file whose size sparsity=megabytes counts; choose "
                "export.dtype=model, and quantization=float16 for half precision"
            )
        elif self._rounds and self.export == Export("bitmask", "float16"):
            yield (
                f"export.dtype=float16 does not hold the numbers that quantization={self.quantization.name} rounds to; "
                "choose export.dtype=model, with which the bitmask format stores them in few bits"
            )
        if isinstance(self.finetune_strategy, OnePass):
            yield from self._finetune_faults(self.finetune_strategy)
        if self.method.name != OURS:
            yield from self._baseline_faults()

    @property
    def _rounds(self) -> bool:
        """Whether the weights become integers; a baseline does not round."""
        return self.method.name == OURS and isinstance(self.quantization, Integers)

    def _offload_faults(self) -> Iterator[str]:
        if self.calibration.propagation != "sequential" or not isinstance(self.allocation, Uniform):
            yield (
                "model.offload=true goes from layer to layer and never has the whole model's gradients; choose "
                "calibration.propagation=sequential and allocation=uniform with it"
            )
        if self.solver.weights_outputs:  # a recovery is refused anyway
            yield (
                "model.offload=true has one layer in memory, and solver.output_weighting=fisher takes gradients of the "
                "whole model; choose solver.output_weighting=equal with it"
            )
        if isinstance(self.recovery, Global):
            yield "model.offload=true cannot recover the whole model, which takes all of it; choose another recovery"
        if self.finetune_strategy.name != "none":
            yield "model.offload=true cannot tune, which takes the whole model; choose finetune_strategy=none with it"
        if isinstance(self.sparsity, Megabytes):
            yield (
                "model.offload=true writes layer after layer and cannot go back when the file comes out too large; "
                "choose sparsity=unstructured, or model.offload=false"
            )
        if isinstance(self.sparsity, Structured):
            yield (
                "model.offload=true writes layers of the sizes that it reads, and sparsity=structured cuts them; "
                "choose model.offload=false"
            )
        if self.scope != TRANSFORMER:
            yield f"model.offload=true prunes the layers alone; choose scope={TRANSFORMER} with it"
        if self.two_models:
            yield (
                f"model.offload=true has one layer in memory, and objective={self.objective.name} with "
                f"recovery={self.recovery.name} takes two; choose symmetric and none"
            )

    def _finetune_faults(self, strategy: OnePass) -> Iterator[str]:
        if isinstance(self.sparsity, Megabytes):
            yield (
                f"finetune_strategy={strategy.name} changes the weights whose bytes sparsity=megabytes has counted; "
                "choose finetune_strategy=none (recovery=reconstruction learns without labels) or sparsity=unstructured"
            )
        elif self.sparsity.pattern:
            yield f"finetune_strategy={strategy.name} wants a share of weights; choose sparsity=unstructured with it"
        elif strategy.more_when_sparser and self.sparsity.fraction == 1:
            yield "sparsity.target=1 leaves nothing to tune; choose finetune_strategy=none"
        if isinstance(strategy, Progressive) and isinstance(self.recovery, Elsa):
            yield (
                "recovery=elsa brings weights back that an earlier stage of finetune_strategy=progressive has removed; "
                "choose recovery=global, or finetune_strategy=one_pass"
            )
        if isinstance(strategy, Progressive) and isinstance(self.allocation, Hutchinson):
            for stage in filter(None, self.stages[:-1]):
                for fault in alpha_faults(self.allocation.alpha, stage):
                    yield f"{fault} (one of finetune_strategy.stages)"

    def _baseline_faults(self) -> Iterator[str]:
        if self.finetune_strategy.name == "progressive":
            yield (
                f"finetune_strategy=progressive goes with method={OURS} alone; choose one_pass, which makes as many "
                "updates"
            )
        if self.model.offload:
            yield f"model.offload=true goes with method={OURS} alone"
        if self.scope != TRANSFORMER:
            yield f"scope={self.scope} goes with method={OURS} alone; choose scope={TRANSFORMER}"
        if self.training.processes != 1 and self.finetune_strategy.name != "none":
            yield f"training.processes={self.training.processes} goes with method={OURS} alone; choose 1"
        if not isinstance(self.sparsity, Unstructured):
            yield f"sparsity={self.sparsity.name} goes with method={OURS} alone; choose sparsity=unstructured"
        if self.quantization.name != "none":
            yield f"quantization={self.quantization.name} goes with method={OURS} alone; choose quantization=none"


@dataclass
class TrainConfig:
    """One training of a dense model."""

    data: Data = option(DemoData, "which speech is learned")
    architecture: dict[str, Any] = option(dict, "model_type and settings of transformers; empty: that of initial_model")
    initial_model: str | None = option(None, "model whose parameters are taken wherever name and shape agree")
    initial_revision: str | None = option(None, "branch, tag or commit of an initial_model on the hub; null: main")
    vocabulary: str = option(
        "initial_model",
        "initial_model (its tokenizer, if it has a CTC head) or transcripts (their characters)",
        choices=("initial_model", "transcripts"),
    )
    training: Training = option(Training, "how it trains")
    output: str = option("outputs/demo-model", "folder of the trained model; a killed training goes on from there")
    device: str = option("auto", "auto (the GPU if there is one), cpu or cuda")

    @property
    def roles(self) -> list[str]:
        """What a training reads speech for, as in :data:`~sparsewav.settings.data.ROLES`."""
        return ["training", "development", "evaluation"]

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            UserError: There are faults; it has a line for each.
        """
        lines = [*group_faults(self), *subset_faults(self.data, self.roles), *device_faults(self.device)]
        if not self.architecture and self.initial_model is None:
            lines.append(
                "architecture is empty; choose one (architecture=demo), or name the initial_model whose it is to be"
            )
        if lines:
            raise UserError("\n".join(lines))


def device_faults(device: str) -> Iterator[str]:
    """Give a sentence if there is no device of that name."""
    if device and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        yield f"device={device} is not known; choose auto, cpu, cuda or cuda:1"


SCHEMAS: dict[str, tuple[type, ...]] = {
    "model": (Model,),
    "data": (DemoData, Manifest, HuggingFace, LibriSpeechFolder, LibriSpeechHub),
    "calibration": (Calibration,),
    **OPTIONS,
    "finetune_strategy": STRATEGIES,
    "training": (Training,),
    "method": METHODS,
    "tracker": (Tracker, Wandb),
}
"""The dataclasses of every group, the default first. Hydra knows each as ``base_<class>``."""
