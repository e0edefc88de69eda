"""L0 regularization in three forms: DPHuBERT and DPWavLM, fine-grained (Wang et al. 2023), and with the CTC loss alone.

All train hard-concrete gates until the expected size of the encoder meets the target, remove what the closed gates
cover, and train on. They differ in what is gated, and in whether the student learns from the teacher's hidden states or
from transcripts.
"""

import copy
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from sparsewav.baselines.cut import cut
from sparsewav.baselines.distillation import no_masking
from sparsewav.baselines.gated import (
    MISSED,
    Distillation,
    DistilledStudent,
    FollowTarget,
    GatedStudent,
    Objective,
    ctc_loss,
    distilled_layers,
)
from sparsewav.baselines.gates import Gates, encoder_parameters, meet_target
from sparsewav.baselines.method import CompressionReport
from sparsewav.data.batches import collate
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.files import damage, write_checksums, write_folder
from sparsewav.models.bitmask import read_model
from sparsewav.models.checkpoint import not_finite
from sparsewav.models.processor import Processor
from sparsewav.progress import print_warning
from sparsewav.pruning.hessian import Progress
from sparsewav.settings.baselines import Gated
from sparsewav.training.trainer import Log, ParameterGroup, train


def compress(
    dense: PreTrainedModel,
    processor: Processor,
    training_set: Sequence[Utterance],
    settings: Gated,
    folder: Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, CompressionReport]:
    """Train with gates, cut, and train the cut model; see :class:`~sparsewav.baselines.Method` for the arguments.

    The cut model is kept in the folder, so that an interrupted compression does not train the gates again.
    """
    set_seed(seed)
    total = settings.updates + settings.final_updates

    def learn(module: nn.Module, student: PreTrainedModel, phase: Gated, name: str, done: int, **options: Any) -> Log:
        shown: Progress | None = (lambda update, _: progress(done + update, total)) if progress else None
        read = partial(collate, processor=processor)
        options |= {"progress": shown, "frozen": [dense] if settings.teacher else []}
        with no_masking(student) if settings.teacher else nullcontext():
            return train(module, read, training_set, phase, phase.updates, folder / name, **options)

    objective: Objective = ctc_loss
    if settings.teacher:
        objective = Distillation(dense, distilled_layers(dense.config.num_hidden_layers)).to(dense.device)
    if (folder / "cut").is_dir() and (damaged := damage(folder / "cut")):
        print_warning(f"{folder / 'cut' / damaged} is damaged; the model is cut again")
        shutil.rmtree(folder / "cut")
    if not (folder / "cut").is_dir():
        _train_and_cut(dense, settings, objective, partial(learn, seed=seed, done=0), folder / "cut")
    record = torch.load(folder / "cut" / "record.pt", weights_only=True)
    if isinstance(objective, nn.Module):
        objective.load_state_dict(record["objective"])
    smaller: Any = read_model(folder / "cut", None)
    smaller.to(dense.device)
    facts, log = record["facts"], record["log"]
    if settings.final_updates:
        rate, warmup = settings.final_learning_rate, settings.final_warmup_steps
        phase = replace(settings, updates=settings.final_updates, learning_rate=rate, warmup_steps=warmup)
        entries = learn(DistilledStudent(smaller, objective), smaller, phase, "final", settings.updates, seed=seed + 1)
        log += [{"phase": "after the cut"} | entry for entry in entries]
    warnings = []
    if abs(facts["expected_sparsity"] - settings.target) > MISSED:
        warnings.append(
            f"the gates' expected sparsity was {facts['expected_sparsity']:.3f} at the end of their training, not "
            f"{settings.target:g}; log α was moved by {facts['gates_moved_by']:.2f} before the cut to meet it"
        )
    return smaller, CompressionReport(total, settings.batch_size, log=log, warnings=warnings, facts=facts)


def _train_and_cut(
    dense: PreTrainedModel, settings: Gated, objective: Objective, learn: Callable[..., Log], folder: Path
) -> None:
    """Train with gates, and write the cut model and its record to a folder."""
    student = copy.deepcopy(dense)
    for parameter in student.parameters():
        parameter.requires_grad_(True)  # those of a teacher take no gradient
    drop_rates = dict.fromkeys(settings.gated, settings.drop_rate) | {"units": settings.unit_drop_rate}
    gates = Gates(student, settings.gated, drop_rates, straight_through=settings.straight_through)
    trained = GatedStudent(student, gates, objective, settings.target, settings.ramp_updates).to(dense.device)
    groups = [
        ParameterGroup(list(gates.parameters()), settings.gate_learning_rate),
        ParameterGroup(list(trained.lagrangian.parameters()), settings.multiplier_learning_rate, ascend=True),
    ]
    entries = learn(trained, student, settings, "gates", callbacks=[FollowTarget(trained)], parameter_groups=groups)
    expected = float(trained.expected_sparsity().detach())
    moved = meet_target(student, gates, (1 - settings.target) * encoder_parameters(student))
    smaller = cut(student, gates)
    if broken := not_finite(smaller.state_dict()):
        raise UserError(f"{broken} of the cut model has numbers that are not finite; lower method.learning_rate")
    config: Any = smaller.config
    facts = {
        "target": settings.target,
        "expected_sparsity": expected,
        "gates_moved_by": moved,
        "encoder_parameters": encoder_parameters(smaller),
        "encoder_sparsity": 1 - encoder_parameters(smaller) / encoder_parameters(dense),
        "channels": list(config.conv_dim),
        "heads": [len(layer["heads"]) for layer in config.layers],
        "value_dims": [sum(layer["value_dims"]) for layer in config.layers],
        "units": [layer["units"] for layer in config.layers],
    }
    log = [{"phase": "with gates"} | entry for entry in entries]
    state = objective.state_dict() if isinstance(objective, nn.Module) else {}
    with write_folder(folder) as temporary:
        smaller.save_pretrained(temporary)
        torch.save({"objective": state, "facts": facts, "log": log}, temporary / "record.pt")
        write_checksums(temporary)
