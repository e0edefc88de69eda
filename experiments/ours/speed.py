"""Speed: the time of Table 2's models, and of models without some heads and units, on a CPU."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas
from matplotlib.figure import Figure

from experiments.estimate import typed
from experiments.paper import baselines, table2
from experiments.plots import save
from experiments.results import Item, Result, describe, measured_before, percent, reached, summarize, write_measured
from experiments.sweeps import DATA_KEYS, MODEL_KEYS, Job, Scale, Sweep, check_comparable, jobs
from experiments.tables import write_values
from sparsewav.cli.plots import COLORS, STYLE, logarithmic_wer
from sparsewav.errors import UserError

CURVE = tuple(
    Sweep("paper/compression", "base", demo=baselines.DEMO, both=(f"sparsity.target={target}",))
    for target in ("0.7", "0.9")
)
"""The sparsities that Table 2 does not have."""
OURS = (CURVE[0], table2.OURS[0], CURVE[1])
STRUCTURED = (baselines.structured(0.75), baselines.structured(0.5), table2.STRUCTURED)
WITH_TABLE2 = (*OURS, *(sweep for sweep in baselines.SWEEPS if sweep.role == "base"))
SWEEPS = (*WITH_TABLE2, *STRUCTURED)
"""All runs start from one dense model."""

METHOD_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "d")
"""Markers of the other methods, whose points lie too close for names beside them."""
INT8 = "OpenVINO int8"
CUT = "cut or distilled"
STRUCTURED_KIND = "SparseWAV, structured"
KINDS = dict.fromkeys(("magnitude", "parp", "parp_p", "self_pinching"), "other unstructured") | {
    "dense": "dense",
    "sparsewav": "SparseWAV",
    baselines.STRUCTURED: STRUCTURED_KIND,
}
"""Kinds of the methods that leave zeros, of the dense model and of ours; all others are cut or distilled."""
KIND_COLORS = {
    "dense": "#444444",
    "SparseWAV": COLORS[0],
    STRUCTURED_KIND: COLORS[3],
    "other unstructured": COLORS[2],
    CUT: COLORS[1],
}
OWN_KINDS = ("dense", "SparseWAV", STRUCTURED_KIND)
"""Kinds whose points are joined by a line, or are one, and carry their labels in the figure."""
LABELLED = {"SparseWAV": " (sparsity)", STRUCTURED_KIND: " (parameters left)"}
"""What the labels of a kind's points say, for the legend."""


def measure(item: Item, scale: Scale) -> None:
    """Measure the forward pass of every model, unless that is done.

    What it measured goes to ``speed-measured.csv``.

    Raises:
        UserError: A run has no model.
    """
    if _measured(item, scale) is not None:
        return
    from experiments.ours.model_costs import measure_int8, measure_times  # imported late: --help needs no PyTorch

    folders = [job.folder for job in _jobs(item.sweeps, scale)]
    config = typed(_jobs(item.sweeps, scale)[0].config)
    own = [job.folder for job in _jobs(STRUCTURED, scale)]
    table = pandas.concat([measure_times(config.model, folders), measure_int8(config, own)], ignore_index=True)
    write_measured(_measured_file(item, scale), table, folders)


def _measured_file(item: Item, scale: Scale) -> Path:
    return scale.folder / f"{item.name}-measured.csv"


def _measured(item: Item, scale: Scale) -> pandas.DataFrame | None:
    """What :func:`measure` wrote, dense model first; None if it is still to be measured."""
    folders = [job.folder for job in _jobs(item.sweeps, scale)]
    return measured_before(_measured_file(item, scale), folders, ["faster", "bits"])


def _jobs(sweeps: Iterable[Sweep], scale: Scale) -> list[Job]:
    """The first seed's run of every method."""
    return [jobs(sweep, scale)[0] for sweep in sweeps]


def make(item: Item, scale: Scale) -> Result:
    """Draw the figure and make the table beside it.

    Raises:
        UserError: A run or the measurement is missing.
    """
    runs = pandas.concat([baselines.read_methods([sweep], scale).iloc[:1] for sweep in item.sweeps], ignore_index=True)
    measured = _measured(item, scale)
    if measured is None:
        raise UserError(f"the models are not measured; measure them: ./reproduce.sh {scale.name} {item.name}")
    check_comparable(runs, MODEL_KEYS | DATA_KEYS)
    dense = runs["wer_dense"].iloc[0]
    beside = {str(run): index for index, run in enumerate(runs["run"])}  # the dense model is none of them
    places = [beside.get(run) for run in measured["run"]]
    known = ["dense" if place is None else runs["method"].iloc[place] for place in places]
    labels = ["dense" if place is None else _label(runs.iloc[place]) for place in places]
    in_float = [dense if place is None else runs["wer"].iloc[place] for place in places]
    points = measured.assign(
        method=known,
        label=[
            f"{label}, {INT8}" if bits == 8 else label for label, bits in zip(labels, measured["bits"], strict=True)
        ],
        wer=measured["wer"].fillna(pandas.Series(in_float)),
        time=1 / measured["faster"],
    )
    # Each was timed in turns with the dense model, whose median of all makes the times comparable.
    points["milliseconds"] = points["time"] * points["milliseconds"].iloc[0]
    plot(scale.folder / item.name, points)
    values = pandas.DataFrame(
        [{"wer_dense": dense} if place is None else summarize(runs.iloc[[place]], scale.folder) for place in places]
    ).assign(wer_mean=points["wer"])
    measurement = points[["bits", "time", "faster", "swapped", "milliseconds", "milliseconds_dense"]]
    write_values(item, scale, pandas.concat([points["label"].rename("model"), measurement, values], axis=1))
    rows = [
        {
            "Model": row["label"],
            "WER %": f"{100 * row['wer']:.2f}",
            "Reached": "–" if pandas.isna(value["achieved_sparsity"]) else reached(value["achieved_sparsity"]),
            "Updates": "–" if pandas.isna(value["updates"]) else f"{value['updates']:.0f}",
            "Seeds": "–" if pandas.isna(value["seeds"]) else f"{value['seeds']:.0f}",
            "ms": f"{row['milliseconds']:.2f}",
            "Times faster": f"{row['faster']:.2f}",
        }
        for row, value in zip(points.to_dict("records"), values.to_dict("records"), strict=True)
    ]
    first = points.iloc[0]
    notes = [
        *describe(runs, scale),
        "One seed each; reached: the sparsity of the transformer's matrices, zeros and weights that were cut; updates: "
        "of the fine-tuning.",
        f"ms: milliseconds for a second of audio, in one forward pass of {first['audio_seconds']} s in float32 by "
        f"PyTorch; threads: {first['threads']:.0f}, on {first['machine']}; models with zeros accelerated "
        f"(sparsewav.accelerate); median of {first['rounds']:.0f}, in turns with the dense model. {INT8}: exported by "
        "sparsewav-export, calibrated on the calibration set and evaluated anew.",
        _beaten(points),
        "Models that were made smaller (cut, distilled) need no special product to be faster; small matrices gain "
        "less from skipped zeros than those of a full-size model.",
    ]
    return Result(notes, item.files(scale, "png", "pdf", "csv"), pandas.DataFrame(rows))


def _label(run: pandas.Series) -> str:
    """What a run is called: ours by the sparsity reached, or the share of the encoder's parameters that was left."""
    if run["method"] == baselines.STRUCTURED:
        return f"{STRUCTURED_KIND}, {percent(run['target_parameters'])} left"
    if run["method"] == "sparsewav":
        return f"SparseWAV, {reached(run['achieved_sparsity'])}"
    return {row.method: name for name, row in baselines.registered().items()}[run["method"]]


def _beaten(points: pandas.DataFrame) -> str:
    """A sentence on the models that another one beats in WER and in time."""
    beaten = [
        row["label"]
        for row in points.to_dict("records")
        if ((points["wer"] < row["wer"]) & (points["time"] < row["time"])).any()
    ]
    return f"Another model is both faster and better than: {', '.join(beaten) or 'none'}."


def plot(path: Path, points: pandas.DataFrame) -> None:
    """Draw WER over time to ``<path>.png`` and ``<path>.pdf``.

    Args:
        path: The files' path without suffix.
        points: A row a model, with the columns label, method, bits, wer (a fraction) and milliseconds (for a second of
            audio).
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 5.0), layout="constrained")
        axes = figure.add_subplot()
        for (method, bits), own in points.groupby(["method", "bits"]):
            if method in baselines.OURS:
                own, dashes = own.sort_values("milliseconds"), "--" if bits == 8 else "-"
                axes.plot(own["milliseconds"], 100 * own["wer"], dashes, color=KIND_COLORS[KINDS[method]], zorder=2)
        markers = iter(METHOD_MARKERS)
        for row in points.to_dict("records"):
            kind = KINDS.get(row["method"], CUT)
            marker, label = ("o", kind) if kind in OWN_KINDS else (next(markers), row["label"])
            face = "white" if row["bits"] == 8 else None
            label = f"{label}, {INT8}" if row["bits"] == 8 else f"{label}{LABELLED.get(label, '')}"
            place = (row["milliseconds"], 100 * row["wer"])
            style: dict[str, Any] = {"color": KIND_COLORS[kind], "markerfacecolor": face or KIND_COLORS[kind]}
            axes.plot(*place, marker, label=label, zorder=3, linestyle="none", **style)
            if kind in OWN_KINDS[1:] and row["bits"] == 32:
                text = row["label"].removeprefix(f"{kind}, ").removesuffix(" left")
                # Those of the faster curve stand on its left, where the other's are not.
                offset, side = ((-7, -4), "right") if kind == STRUCTURED_KIND else ((6, 2), "left")
                axes.annotate(text, place, xytext=offset, textcoords="offset points", ha=side, fontsize=8)
        axes.set_xlabel("Milliseconds for a second of audio")
        axes.set_ylabel("WER (%)")
        axes.set_xlim(left=0, right=1.15 * points["milliseconds"].max())
        logarithmic_wer(axes)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(list(unique.values()), list(unique), loc="outside lower center", ncols=2, fontsize=8)
        save(figure, path)
