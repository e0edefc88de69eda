"""Size and speed: the bytes of Table 2's models on disk and their time on a CPU."""

from pathlib import Path

import matplotlib as mpl
import pandas
from matplotlib.figure import Figure

from experiments.estimate import typed
from experiments.paper import baselines, table2
from experiments.plots import COLORS, STYLE, logarithmic_wer, save
from experiments.results import Item, Result, describe
from experiments.sweeps import Job, Scale, Sweep, jobs, read
from sparsewav.errors import UserError
from sparsewav.files import write_file
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
    """Measure the file and the forward pass of every model, unless that is done; writes ``size_and_speed.csv``.

    Raises:
        UserError: A run has no model.
    """
    if _measurement(item, scale) is not None:
        return
    from experiments.ours.model_costs import measure_models  # imported late: --help does not wait for PyTorch

    found = _jobs(item, scale)
    table = measure_models(typed(found[0].config).model, [job.folder for job in found])
    methods = ["dense", *(job.config.method.name for job in found)]
    (csv,) = item.files(scale, "csv")
    with write_file(csv) as temporary:
        table.assign(method=methods).to_csv(temporary, index=False)


def _jobs(item: Item, scale: Scale) -> list[Job]:
    """The first seed's run of every method."""
    return [jobs(sweep, scale)[0] for sweep in item.sweeps]


def _measurement(item: Item, scale: Scale) -> pandas.DataFrame | None:
    """What :func:`measure` wrote of these very runs, dense model first; None if they are still to be measured."""
    (path,) = item.files(scale, "csv")
    folders = [job.folder for job in _jobs(item, scale)]
    if not path.is_file():
        return None
    if any((folder / run_folder.METRICS).stat().st_mtime > path.stat().st_mtime for folder in folders):
        return None
    table = pandas.read_csv(path)
    return table if table["run"].tolist()[1:] == [str(folder) for folder in folders] else None


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure and make the table beside it.

    Raises:
        UserError: A run or the measurement is missing.
    """
    runs = pandas.concat([read([sweep], scale).iloc[:1] for sweep in item.sweeps], ignore_index=True)
    measured = _measurement(item, scale)
    if measured is None:
        raise UserError(f"the models are not measured; measure them: ./reproduce.sh {scale.name} {item.name}")
    names = {row.method: name for name, row in baselines.registered().items()}
    labels = [
        f"SparseWAV, {sparsity:.0%}" if method == "sparsewav" else names[method]
        for method, sparsity in zip(runs["method"], runs["target_sparsity"], strict=True)
    ]
    points = measured.assign(
        label=["dense", *labels], wer=[runs["wer_dense"].iloc[0], *runs["wer"]], time=1 / measured["faster"]
    )
    plot(scale.folder / item.name, points)
    rows = [
        {
            "Model": row["label"],
            "WER %": f"{100 * row['wer']:.2f}",
            "MB": f"{row['megabytes']:.2f}",
            "of dense": f"{row['megabytes'] / points['megabytes'].iloc[0]:.3f}",
            "Time, of dense": f"{row['time']:.3f}",
            "Times faster": f"{row['faster']:.2f}",
        }
        for row in points.to_dict("records")
    ]
    first = points.iloc[0]
    notes = [
        describe(runs, scale),
        "MB: the file of the weights, all in float16; of models with zeros in bitmask format.",
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
