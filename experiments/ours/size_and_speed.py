"""Size and speed: the bytes of Table 2's models on disk and their time on a CPU."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas
from matplotlib.figure import Figure

from experiments.estimate import typed
from experiments.paper import baselines, table2
from experiments.plots import save
from experiments.results import Item, Result, describe, reached, summarize
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Job, Scale, Sweep, check_comparable, jobs, read
from experiments.tables import write_values
from sparsewav.cli.plots import COLORS, STYLE, logarithmic_wer
from sparsewav.errors import UserError
from sparsewav.files import content_hash, write_file
from sparsewav.pipeline import run_folder

CURVE = tuple(
    Sweep("paper/compression", "base", demo=baselines.DEMO, both=(f"sparsity.target={target}",))
    for target in ("0.7", "0.9")
)
"""The sparsities that Table 2 does not have."""
OURS = (CURVE[0], table2.OURS[0], CURVE[1])
SWEEPS = (*OURS, *(sweep for sweep in baselines.SWEEPS if sweep.role == "base"))
"""All runs start from one dense model."""

METHOD_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
"""Markers of the other methods, whose points lie too close for names beside them."""


def measure(item: Item, scale: Scale) -> None:
    """Measure the file and the forward pass of every model, unless that is done.

    What it measured goes to ``size_and_speed-measured.csv``.

    Raises:
        UserError: A run has no model.
    """
    if _measurement(item, scale) is not None:
        return
    from experiments.ours.model_costs import measure_models  # imported late: --help does not wait for PyTorch

    found = _jobs(item, scale)
    table = measure_models(typed(found[0].config).model, [job.folder for job in found])
    methods = ["dense", *(job.config.method.name for job in found)]
    with write_file(_measured_file(item, scale)) as temporary:
        table.assign(method=methods, metrics=["", *_fingerprints(found)]).to_csv(temporary, index=False)


def _measured_file(item: Item, scale: Scale) -> Path:
    return scale.folder / f"{item.name}-measured.csv"


def _fingerprints(found: list[Job]) -> list[str]:
    """Hashes of the runs' metrics, which tell whether a run was made again after it was measured."""
    return [content_hash(job.folder / run_folder.METRICS) for job in found]


def _jobs(item: Item, scale: Scale) -> list[Job]:
    """The first seed's run of every method."""
    return [jobs(sweep, scale)[0] for sweep in item.sweeps]


def _measurement(item: Item, scale: Scale) -> pandas.DataFrame | None:
    """What :func:`measure` wrote of these very runs, dense model first; None if they are still to be measured."""
    path = _measured_file(item, scale)
    found = _jobs(item, scale)
    try:
        table = pandas.read_csv(path)
        known = list(zip(table["run"], table["metrics"], strict=True))[1:]
    except (OSError, ValueError, KeyError):
        return None
    wanted = zip((str(job.folder) for job in found), _fingerprints(found), strict=True)
    return table if known == list(wanted) and np.isfinite(table[["megabytes", "faster"]]).all(axis=None) else None


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure and make the table beside it.

    Raises:
        UserError: A run or the measurement is missing.
    """
    runs = pandas.concat([read([sweep], scale).iloc[:1] for sweep in item.sweeps], ignore_index=True)
    measured = _measurement(item, scale)
    if measured is None:
        raise UserError(f"the models are not measured; measure them: ./reproduce.sh {scale.name} {item.name}")
    check_comparable(runs, MODEL_KEYS | DATA_KEYS)
    names = {row.method: name for name, row in baselines.registered().items()}
    labels = [
        f"SparseWAV, {reached(sparsity)}" if method == "sparsewav" else names[method]
        for method, sparsity in zip(runs["method"], runs["achieved_sparsity"], strict=True)
    ]
    points = measured.assign(
        label=["dense", *labels], wer=[runs["wer_dense"].iloc[0], *runs["wer"]], time=1 / measured["faster"]
    )
    plot(scale.folder / item.name, points)
    values = pandas.DataFrame(
        [{"wer_dense": runs["wer_dense"].iloc[0]}]
        + [summarize(runs.iloc[[index]], scale.folder) for index in range(len(runs))]
    )
    measurement = points[["megabytes", "time", "faster", "swapped", "milliseconds", "milliseconds_dense"]]
    write_values(item, scale, pandas.concat([points["label"].rename("model"), measurement, values], axis=1))
    rows = [
        {
            "Model": row["label"],
            "WER %": f"{100 * row['wer']:.2f}",
            "Reached": "–" if pandas.isna(value["achieved_sparsity"]) else reached(value["achieved_sparsity"]),
            "Updates": "–" if pandas.isna(value["updates"]) else f"{value['updates']:.0f}",
            "Seeds": "–" if pandas.isna(value["seeds"]) else f"{value['seeds']:.0f}",
            "MB": f"{row['megabytes']:.2f}",
            "of dense": f"{row['megabytes'] / points['megabytes'].iloc[0]:.3f}",
            "Time, of dense": f"{row['time']:.3f}",
            "Times faster": f"{row['faster']:.2f}",
        }
        for row, value in zip(points.to_dict("records"), values.to_dict("records"), strict=True)
    ]
    first = points.iloc[0]
    notes = [
        *describe(runs, scale),
        "One seed each; reached: the sparsity of the transformer's matrices, zeros and weights that were cut; updates: "
        "of the fine-tuning.",
        "MB: the file of the weights in float16; of models with zeros in bitmask format, of rounded ones in few bits.",
        f"Time: one forward pass of {first['audio_seconds']} s of audio in float32 (dense: "
        f"{first['milliseconds']:.1f} ms for a second of it), threads: {first['threads']}, on "
        f"{first['machine']}; models with zeros accelerated (sparsewav.accelerate); median of {first['rounds']}, in "
        "turns with the dense model.",
        *_beaten(points),
        "Models that were made smaller (cut, distilled) need no special product to be faster; small matrices gain "
        "less from skipped zeros than those of a full-size model.",
    ]
    return Result(notes, item.files(scale, "png", "pdf", "csv"), pandas.DataFrame(rows))


def _beaten(points: pandas.DataFrame) -> list[str]:
    """Sentences on the models that another one beats in WER and in size, and in WER and in time."""
    sentences = []
    for column, what in (("megabytes", "smaller"), ("time", "faster")):
        beaten = [
            row["label"]
            for row in points.to_dict("records")
            if ((points["wer"] < row["wer"]) & (points[column] < row[column])).any()
        ]
        sentences.append(f"Another model is both {what} and better than: {', '.join(beaten) or 'none'}.")
    return sentences


def plot(path: Path, points: pandas.DataFrame) -> None:
    """Draw WER over megabytes and over time to ``<path>.png`` and ``<path>.pdf``.

    Args:
        path: The files' path without suffix.
        points: A row a model, with the columns label, method, wer (a fraction), megabytes, and time (a share of the
            dense model's).
    """
    kinds = dict.fromkeys(("magnitude", "parp", "parp_p"), "other unstructured")
    kinds |= {"dense": "dense", "sparsewav": "SparseWAV"}
    colors = {
        "dense": "#444444",
        "SparseWAV": COLORS[0],
        "other unstructured": COLORS[2],
        "cut or distilled": COLORS[1],
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 4.4), layout="constrained")
        panels = (
            ("megabytes", "Weights on disk, float16 (MB)"),
            ("time", "Time of a forward pass, of the dense model's"),
        )
        for axes, (column, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            own = points[points["method"] == "sparsewav"].sort_values("megabytes")
            axes.plot(own[column], 100 * own["wer"], color=COLORS[0], zorder=2)
            markers = iter(METHOD_MARKERS)
            for row in points.to_dict("records"):
                kind = kinds.get(row["method"], "cut or distilled")
                own_point = kind in ("dense", "SparseWAV")
                marker, label_of = ("o", kind) if own_point else (next(markers), row["label"])
                place = (row[column], 100 * row["wer"])
                axes.plot(*place, marker, color=colors[kind], label=label_of, zorder=3, linestyle="none")
                if kind == "SparseWAV":
                    text = row["label"].removeprefix("SparseWAV, ")
                    axes.annotate(text, place, xytext=(6, 2), textcoords="offset points", fontsize=8)
            axes.set_xlabel(label)
            axes.set_xlim(left=0, right=1.15 * points[column].max())
            logarithmic_wer(axes)
        figure.axes[0].set_ylabel("WER (%)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=4, fontsize=8)
        save(figure, path)
