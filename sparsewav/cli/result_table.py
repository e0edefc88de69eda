"""The table at the end of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsewav.pipeline.naming import LATER_CHOICES, last_change, papers_choice
from sparsewav.settings.sparsity import COUNTED


def show_result(metrics: dict[str, Any], folder: Path, console: Console) -> None:
    """Show what a run cost and where its results are."""
    seconds = metrics["seconds"]
    tuned, change, rounded = {}, last_change(metrics), metrics["bits"] is not None
    if metrics["updates"]:
        path = ", ".join(
            f"{stage['sparsity']:g}: {100 * stage['wer_pruned']:.2f} -> {100 * stage['wer']:.2f} %"
            for stage in metrics["stages"]
        )
        tuned[f"word error rate, {change}"] = f"{_rates(metrics, '')}   after {metrics['updates']:,} updates"
        tuned["stages"] = path
    elif change and metrics["wer"] is not None:
        tuned[f"word error rate, {change}"] = _rates(metrics, "")
    compression, matrices = metrics["compression"], f"the {metrics['scope']}'s matrices"
    spent = [stage for stage in ("calibrate", "allocate", "solve", "recover", "quantize") if stage in seconds]
    if compression:
        made = {
            "compression": f"{compression['updates']:,} updates of {compression['batch_size']} utterances",
            "sparsity, reached": f"{metrics['achieved_sparsity']:.4f}   of {matrices}",
            "parameters, before": f"{compression['params_dense']:,}",
            "parameters, after": f"{metrics['params_nonzero']:,}   ({100 * compression['share_left']:.1f} %)",
            "seconds": f"compress {seconds['compress']:.1f}",
        }
    else:
        made = {
            **_asked(metrics),
            "sparsity, reached": f"{metrics['achieved_sparsity']:.4f}   of {matrices}",
            **({"bits, nominal": f"{metrics['bits']:.3g}   a weight of {matrices}"} if rounded else {}),
            "parameters, before": f"{metrics['params_dense']:,}",
            "parameters, after": _parameters(metrics),
            "seconds": ", ".join(_spent(metrics, stage) for stage in spent) + f"; prune {seconds['prune']:.1f}",
        }
    made["seconds"] += f"; finetune {seconds['finetune']:.1f}" if metrics["updates"] else ""
    made["seconds"] += f"; {_spent(metrics, 'evaluate')}"
    made["seconds"] += "; cached: spent by an earlier run" if metrics["seconds_cached"] else ""
    smaller = "compressed" if compression else "pruned"
    utterances = " and ".join(str(record["n_utterances"]) for record in metrics["evaluation"])
    seen = [
        f"{record['overlap']} of its utterances are in the calibration or training set, too"
        + (f" ({record['name']})" if len(metrics["evaluation"]) > 1 else "")
        for record in metrics["evaluation"]
        if record["overlap"]
    ]
    rows = {
        **({"evaluation set": "\n".join(seen)} if seen else {}),
        **(
            _divergences(metrics)
            if metrics["wer"] is None
            else {
                "word error rate, dense": _rates(metrics, "_dense"),
                f"word error rate, {smaller}": f"{_rates(metrics, '_pruned')}   on {utterances} utterances",
            }
        ),
        **tuned,
        **made,
        "size": f"{metrics['bytes'] / 1e6:.2f} MB of weights in bitmask format",
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB on {metrics['device']}",
        "outputs": str(folder),
    }
    if (folder / "model").is_dir():
        rows[f"{smaller} model"] = str(folder / "model")
    later = [metrics[group] for group in LATER_CHOICES if metrics[group] not in (papers_choice(group), None)]
    first = [metrics["saliency"]] if metrics["saliency"] else later[:1]  # a solver without it, as in folders' names
    if metrics["achieved_share"] is not None:
        first = ["parts removed whole"]
    later = [choice for choice in later if choice not in first]
    how = metrics["method"] if compression else ", ".join([*first, metrics["allocation"], *later])
    table = Table(title=f"{metrics['model']}: {how}", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def _asked(metrics: dict[str, Any]) -> dict[str, str]:
    if metrics["target_megabytes"] is not None:
        reached = f"{metrics['bytes'] / 1e6:.4f}   the weights file of model-bitmask"
        return {"megabytes, asked": f"{metrics['target_megabytes']:g}", "megabytes, reached": reached}
    for key, name in COUNTED.items():
        if metrics[f"target_{key}"] is not None:
            reached = f"{metrics['achieved_share']:.4f}   of the encoder's"
            return {f"{name}, asked": f"{metrics[f'target_{key}']:g}", f"{name}, reached": reached}
    if metrics.get("asked_speedup") is not None:
        return _speed(metrics)
    pattern = f"   ({metrics['pattern']})" if metrics["pattern"] else ""
    return {"sparsity, asked": f"{metrics['target_sparsity']:.4f}{pattern}"}


def _speed(metrics: dict[str, Any]) -> dict[str, str]:
    """Say how many times as fast the model is as was asked for, and what was timed and how."""
    how = metrics["latency"]
    before, after = (sum(how[key]) for key in ("seconds_dense", "seconds"))
    low, high = how["speedup_quartiles"]
    return {
        "speed-up, asked": f"{metrics['asked_speedup']:g}",
        "speed-up, measured": f"{metrics['achieved_speedup']:.3f}   half of the rounds from {low:.3f} to {high:.3f}",
        "time, dense and now": f"{before:.4f} and {after:.4f} s",
        "timed with": f"{how['conditions']}, {how['processor']}",
    }


def _parameters(metrics: dict[str, Any]) -> str:
    total, nonzero = metrics["params_total"], metrics["params_nonzero"]
    if metrics["achieved_share"] is not None:
        return f"{total:,}   ({100 * total / metrics['params_dense']:.1f} %)"
    # Of the sparsity that was reached they are no part.
    by_rounding = "" if metrics["bits"] is None else ", with those that were rounded to zero"
    return f"{nonzero:,}   ({total - nonzero:,} are zero{by_rounding})"


def _rates(metrics: dict[str, Any], model: str) -> str:
    """Give the WER of a model, and its CER beside it; a line for every evaluation set where there are several."""
    records = metrics["evaluation"]
    return "\n".join(
        f"{100 * record[f'wer{model}']:.2f} %   (CER {100 * record[f'cer{model}']:.2f} %)"
        + (f"   {record['name']}" if len(records) > 1 else "")
        for record in records
    )


def _divergences(metrics: dict[str, Any]) -> dict[str, str]:
    """Tell how far an encoder's hidden states are from the dense one's; a line for every evaluation set."""
    records = metrics["evaluation"]

    def lines(show: Callable[[dict[str, Any]], str]) -> str:
        return "\n".join(show(item) + (f"   {item['name']}" if len(records) > 1 else "") for item in records)

    return {
        "hidden states, last": lines(
            lambda item: f"{item['divergence']:.4g} relative squared error, {item['n_utterances']} utterances"
        ),
        "hidden states, by layer": lines(lambda item: _by_layer(item, "relative_error", ".2g")),
        "cosine, by layer": lines(lambda item: _by_layer(item, "cosine_similarity", ".3f")),
    }


def _by_layer(record: dict[str, Any], figure: str, form: str) -> str:
    return " ".join(f"{layer[figure]:{form}}" for layer in record["layers"])


def _spent(metrics: dict[str, Any], piece: str) -> str:
    """Say how long a piece of the work took, and how much of that an earlier run spent, whose result was cached."""
    seconds, cached = metrics["seconds"][piece], metrics["seconds_cached"].get(piece)
    return f"{piece} {seconds:.1f}" + ("" if cached is None else f" ({cached:.1f} cached)")
