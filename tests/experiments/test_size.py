"""The figure and the tables of bytes on disk: drawn from made-up runs, and measured on small models."""

import os
from pathlib import Path

import pandas
import pytest
import torch

import sparsewav
from experiments.estimate import typed
from experiments.items import ITEMS
from experiments.ours import speed
from experiments.ours.model_costs import ROUNDINGS, measure_rounded, round_numbers
from experiments.ours.size import POINTS, SIZES, Point
from experiments.ours.size_figure import BOTH, BUDGET, PRUNED, QUANTIZED
from experiments.results import write_measured
from experiments.sweeps import Scale, jobs
from sparsewav.errors import UserError
from tests.finished import change, finish


def _size(point: Point, place: int) -> int:
    """Bytes a little below what was asked for, or, where no size was, one for each point."""
    if point.size is None:
        return 700_000 + 50_000 * place
    return round(1e6 * SIZES["demo"][point.size]) - 10_000


def _wer(point: Point, place: int) -> float:
    worth = {QUANTIZED: 0.20, PRUNED: 0.40, BOTH: 0.15, BUDGET: 0.10}
    return worth.get(point.kind, 0.3) + 0.01 * (place % 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, of which every sweep is composed once."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def scale(folder: Path) -> Scale:
    """A folder with finished runs of every point and of Table 2, and with what was measured of the latter."""
    scale = Scale("demo", folder)
    for place, point in enumerate(POINTS):

        def wer(settings: dict[str, str], point: Point = point, place: int = place) -> float:
            return _wer(point, place) + 0.01 * int(settings["seed"])

        finish(point.sweep, scale, wer, bytes=_size(point, place), bits=3.0)
    for sweep in speed.WITH_TABLE2:
        finish(sweep, scale, lambda settings: 0.5)
    folders = [job.folder for sweep in speed.WITH_TABLE2 for job in jobs(sweep, scale)]
    rows = [
        {"run": run, "rounding": rounding, "bytes": size, "bits": bits, "wer": wer}
        for run, wer in [("demo", 0.05), *((str(run), 0.6) for run in folders)]
        for rounding, bits, size in (("float32", 32, 12e6), ("float16", 16, 6e6), ("int8", 8, 3e6))
        if run == "demo" or bits < 32
    ]
    write_measured(folder / "size-measured.csv", pandas.DataFrame(rows), folders)
    return scale


def test_the_figure_of_sizes_has_every_model_and_marks_the_front(scale: Scale) -> None:
    item = ITEMS["size"]
    result = item.make(item, scale)
    assert [path.suffix for path in result.files] == [".png", ".pdf", ".csv", ".md", ".tex"]
    assert all(path.stat().st_size for path in result.files)
    table = pandas.read_csv(scale.folder / "size.csv")
    assert len(table) == 3 + len(POINTS) + 2 * len(speed.WITH_TABLE2)
    models = list(zip(table["bytes"], table["wer_mean"], strict=True))
    beaten = [any(size <= own and wer < rate for size, wer in models) for own, rate in models]
    assert table["front"].tolist() == [not item for item in beaten]
    ours = table[table["kind"] == BUDGET].iloc[0]
    assert ours[["seeds", "bits", "bytes", "seconds"]].tolist() == [3, 3, 1_490_000, 6]
    assert ours["wer_deviation"] == pytest.approx(0.01)
    rounded = table.set_index(["kind", "label"]).loc[("Table 2, int8", "PARP")]
    assert rounded[["wer_mean", "bytes", "updates"]].tolist() == [0.6, 3e6, 400], "measured anew, and not the run's own"
    change(jobs(speed.WITH_TABLE2[0], scale)[0].folder, wer=0.4)
    with pytest.raises(UserError, match=r"not measured; measure them: \./reproduce\.sh demo size"):
        item.make(item, scale)


def test_budgets_compare_the_best_that_fits_of_every_kind(scale: Scale) -> None:
    item = ITEMS["budgets"]
    result = item.make(item, scale)
    assert result.table is not None
    assert result.table["At most"].tolist() == ["1.5 MB", "1.2 MB", "1 MB", "0.8 MB"]
    table = pandas.read_csv(scale.folder / "budgets.csv").set_index(["at_most_megabytes", "kind"])
    quantized = [
        (_size(point, place), _wer(point, place)) for place, point in enumerate(POINTS) if point.kind == QUANTIZED
    ]
    for megabytes in SIZES["demo"]:
        best = min((wer for size, wer in quantized if size <= 1e6 * megabytes), default=None)
        rates = table.loc[megabytes]["wer_mean"]
        assert rates.get(QUANTIZED) == (best and pytest.approx(best + 0.01))
        own = table.loc[(megabytes, BUDGET)]
        assert own["above_dense"] == pytest.approx(rates[BUDGET] - 0.05)
        assert table.loc[(megabytes, BOTH), "difference"] == pytest.approx(rates[BUDGET] - rates[BOTH], abs=0.004)
    assert table["bytes_most"].le(1e6 * table.index.get_level_values(0)).all()
    assert result.table["Budget − best other"].str.contains(BOTH).all()
    assert not any("†" in note for note in result.notes)


def test_a_file_above_its_budget_is_marked_and_one_of_unknown_size_is_refused(scale: Scale) -> None:
    item = ITEMS["budgets"]
    point = next(point for point in POINTS if point.kind == BUDGET)
    last = jobs(point.sweep, scale)[-1]
    change(last.folder, bytes=1_500_001)
    result = item.make(item, scale)
    assert result.table is not None
    assert ["†" in cell for cell in result.table[BUDGET]] == [True, False, False, False]
    assert "† A file of it is larger than that." in result.notes
    change(last.folder, bytes=None)
    with pytest.raises(UserError, match="does not say the bytes of its model"):
        item.make(item, scale)


def test_models_of_other_methods_are_rounded_and_counted_as_the_file_would_be(
    model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Zeros stay zero, int8 is half of float16, and the bytes are those of the real file."""
    overrides = (f"model.name_or_path={model_folder}", "data=librispeech_dir", f"data.root={corpus}")
    subsets = ("data.evaluation_subset=test", "data.calibration_subset=train", "data.training_subset=train")
    scale = Scale("demo", tmp_path, (*overrides, *subsets, "device=cpu"))
    config = typed(jobs(speed.WITH_TABLE2[0], scale)[0].config)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="has no model"):
        measure_rounded(config, [run])
    speech = sparsewav.load_model(str(model_folder))
    weight = speech.model.wav2vec2.encoder.layers[0].attention.q_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    sparsewav.save(speech, run / "model")
    table = measure_rounded(config, [run])
    assert table[["run", "rounding", "bits"]].to_numpy().tolist() == [
        [str(model_folder), "float32", 32],
        [str(model_folder), "float16", 16],
        [str(model_folder), "int8", 8],
        [str(run), "float16", 16],
        [str(run), "int8", 8],
    ]
    assert table["bytes"][0] == pytest.approx(os.path.getsize(model_folder / "model.safetensors"), abs=50)  # its header
    for row in table.iloc[3:].to_dict("records"):
        speech = sparsewav.load_model(str(run / "model"))
        round_numbers(speech.model, ROUNDINGS[row["rounding"]][1])
        sparsewav.save(speech, tmp_path / row["rounding"], format="bitmask")
        written = tmp_path / row["rounding"] / "model.bitmask.safetensors"
        assert os.path.getsize(written) == row["bytes"]
        weight = speech.model.wav2vec2.encoder.layers[0].attention.q_proj.weight
        assert not weight[:, ::2].any()
        assert weight[:, 1::2].any()
        again = sparsewav.load_model(str(tmp_path / row["rounding"]))
        assert sparsewav.evaluate(again, config.data).wer == row["wer"]
