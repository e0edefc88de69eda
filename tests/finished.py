"""Records of finished runs, made up, for tests of what is drawn from them."""

import json
from collections.abc import Callable
from pathlib import Path

from experiments.sweeps import MODELS, Scale, Sweep, jobs
from sparsewav.pipeline import run_folder


def finish(
    sweep: Sweep, scale: Scale, wer: Callable[[dict[str, str]], float], dense: float = 0.05, **more: object
) -> None:
    """Write the records of finished runs, with more keys where they are given."""
    for job in jobs(sweep, scale):
        config = job.config
        ours = config.method.name == "sparsewav"
        target = config.sparsity.get("target")
        groups = ("saliency", "solver", "objective", "recovery", "allocation")
        metrics = {
            "model": MODELS[scale.name][sweep.role],
            "method": config.method.name,
            **{group: config[group].name if ours else None for group in groups},
            "finetune_strategy": config.finetune_strategy.name,
            "scope": config.scope,
            "seed": config.seed,
            "quantization": config.quantization.name if ours else None,
            "target_sparsity": target,
            "achieved_sparsity": 0.6 if target is None else max(target - 0.01, 0),
            "params_total": 3_000_000,
            "params_nonzero": 800_000,
            "wer_dense": dense,
            "wer": wer(job.settings),
            "updates": 0 if config.finetune_strategy.name == "none" else 400,
            "n_utterances": 30,
            "n_calibration_utterances": 128,
            "macs_per_second": 200_000_000,
            "macs_per_second_nonzero": 100_000_000,
            "compression": None,
            "warnings": [],
            "seconds": {"calibrate": 1.0, "allocate": 2.0, "solve": 3.0, "prune": 6.0, "finetune": 4.0},
            "seconds_cached": {},
            "device": "cpu",
            "threads": 2,
        }
        if not ours:
            metrics["compression"] = {
                "updates": 200,
                "batch_size": 24,
                "params_dense": 3_200_000,
                "update_divisor": 1e3,
                "lr_multiplier": 4.0,
            }
            metrics["seconds"] = {"compress": 60.0, "prune": 60.0, "finetune": 4.0}
        for key in {"megabytes", "parameters", "macs"} & config.sparsity.keys():
            metrics[f"target_{key}"] = config.sparsity[key]
        learned = {"recovery": {"updates": config.recovery.updates}} if metrics["recovery"] == "global" else {}
        metrics["stages"] = [{"sparsity": target} | learned]
        write_details(job.folder, metrics["wer"])
        run_folder.write_json(job.folder / run_folder.METRICS, metrics | more)


def write_details(folder: Path, wer: float) -> None:
    """Write transcripts of 30 utterances of ten words with so many errors, and a matrix's error."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"word{number}" for number in range(10)]
    rows = []
    for utterance in range(30):
        errors = min(int((utterance + 1) * 10 * wer) - int(utterance * 10 * wer), 10)
        wrong = ["wrong"] * errors + words[errors:]
        rows.append(
            {
                "set": "test",
                "id": f"{utterance % 6}-0-{utterance:04d}",
                "reference": " ".join(words),
                "after": " ".join(wrong),
            }
        )
    (folder / run_folder.PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / run_folder.LAYERS).write_text("name,relative_error\nq,0.1\nk,0.2\n")


def change(folder: Path, **metrics: object) -> None:
    path = folder / run_folder.METRICS
    run_folder.write_json(path, json.loads(path.read_text()) | metrics)
