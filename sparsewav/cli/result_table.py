"""The table at the end of a run."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsewav.pipeline.naming import LATER_CHOICES, papers_choice


def show_result(metrics: dict[str, Any], folder: Path, console: Console) -> None:
    """Show what a run cost and where its results are."""
    seconds = metrics["seconds"]
    removed = metrics["params_total"] - metrics["params_nonzero"]
    tuned = {}
    if metrics["updates"]:
        path = ", ".join(
            f"{stage['sparsity']:g}: {100 * stage['wer_pruned']:.2f} -> {100 * stage['wer']:.2f} %"
            for stage in metrics["stages"]
        )
        tuned["word error rate, tuned"] = f"{100 * metrics['wer']:.2f} %   after {metrics['updates']:,} updates"
        tuned["stages"] = path
    compression = metrics["compression"]
    if compression:
        made = {
            "compression": f"{compression['updates']:,} updates of {compression['batch_size']} utterances",
            "sparsity, reached": f"{metrics['achieved_sparsity']:.4f}   of the transformer's matrices",
            "parameters, before": f"{compression['params_dense']:,}",
            "parameters, after": f"{metrics['params_nonzero']:,}   ({100 * compression['share_left']:.1f} %)",
            "seconds": f"compress {seconds['compress']:.1f}",
        }
    else:
        made = {
            "sparsity, asked": f"{metrics['target_sparsity']:.4f}"
            + (f"   ({metrics['pattern']})" if metrics["pattern"] else ""),
            "sparsity, reached": f"{metrics['achieved_sparsity']:.4f}   of the transformer's matrices",
            "parameters, before": f"{metrics['params_total']:,}",
            "parameters, after": f"{metrics['params_nonzero']:,}   ({removed:,} are zero)",
            "seconds": ", ".join(
                _spent(metrics, stage) for stage in ("calibrate", "allocate", "solve", "recover") if stage in seconds
            )
            + f"; prune {seconds['prune']:.1f}",
        }
    made["seconds"] += f"; finetune {seconds['finetune']:.1f}" if metrics["updates"] else ""
    made["seconds"] += f"; {_spent(metrics, 'evaluate')}"
    made["seconds"] += "; cached: spent by an earlier run" if metrics["seconds_cached"] else ""
    smaller = "compressed" if compression else "pruned"
    seen = f"{metrics['evaluation_overlap']} of its utterances are in the calibration or training set, too"
    rows = {
        **({"evaluation set": seen} if metrics["evaluation_overlap"] else {}),
        **(_divergences(metrics) if metrics["wer"] is None else _error_rates(metrics, smaller)),
        **tuned,
        **made,
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB on {metrics['device']}",
        "outputs": str(folder),
    }
    if (folder / "model").is_dir():
        rows[f"{smaller} model"] = str(folder / "model")
    later = [metrics[group] for group in LATER_CHOICES if metrics[group] not in (papers_choice(group), None)]
    first = [metrics["saliency"]] if metrics["saliency"] else later[:1]  # a solver without it, as in folders' names
    later = [choice for choice in later if choice not in first]
    how = metrics["method"] if compression else ", ".join([*first, metrics["allocation"], *later])
    table = Table(title=f"{metrics['model']}: {how}", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _error_rates(metrics: dict[str, Any], smaller: str) -> dict[str, str]:
    return {
        "word error rate, dense": f"{100 * metrics['wer_dense']:.2f} %",
        f"word error rate, {smaller}": f"{100 * metrics['wer_pruned']:.2f} %   on {metrics['n_utterances']} utterances",
    }


def _divergences(metrics: dict[str, Any]) -> dict[str, str]:
    """Tell how far the hidden states of an encoder are from those of the dense one."""
    layers = metrics["evaluation"][0]["layers"]
    return {
        "hidden states, last": f"{metrics['divergence']:.4g} relative squared error   on {metrics['n_utterances']} "
        "utterances",
        "hidden states, by layer": " ".join(f"{layer['relative_error']:.2g}" for layer in layers),
        "cosine similarity, by layer": " ".join(f"{layer['cosine_similarity']:.3f}" for layer in layers),
    }


def _spent(metrics: dict[str, Any], piece: str) -> str:
    """Say how long a piece of the work took, and how much of that an earlier run spent, whose result was cached."""
    seconds, cached = metrics["seconds"][piece], metrics["seconds_cached"].get(piece)
    return f"{piece} {seconds:.1f}" + ("" if cached is None else f" ({cached:.1f} cached)")
