"""Console command ``sparsewav-inspect``: what a pruned model is made of, and whether its zeros are those reported."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsewav.errors import UserError
from sparsewav.progress import print_error, quieten_libraries

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel

_EPILOG = """examples:
  sparsewav-inspect outputs/RUN             the run's model; also checks its zeros against layers.csv and metrics.json
  sparsewav-inspect some/model --plot heat.png

The exit code is 1 if the model is not what the run's files say.
"""

_RECIPE = (
    "model",
    "method",
    "saliency",
    "solver",
    "objective",
    "recovery",
    "allocation",
    "target_sparsity",
    "finetune_strategy",
    "updates",
    "seed",
    "wer_dense",
    "wer",
)
"""Of ``metrics.json``, what made the model and what came of it."""


@dataclass(frozen=True)
class Sizes:
    """A model's size.

    Attributes:
        parameters: all of them.
        nonzero: those that are not zero.
        dense: bytes of a plain checkpoint in the model's dtype.
        bitmask: bytes in bitmask format, in the same dtype.
        on_disk: bytes of the safetensors that are there.
    """

    parameters: int
    nonzero: int
    dense: int
    bitmask: int
    on_disk: int


def matrix_sparsities(model: "PreTrainedModel") -> "pandas.DataFrame":
    """A row for every prunable matrix: name, layer, role, rows, cols and zeros."""
    import pandas

    from sparsewav.pruning.encoder import prunable_matrices

    rows = []
    for matrix in prunable_matrices(model):
        weight = matrix.weight.detach()
        zeros = weight.numel() - int(weight.count_nonzero())
        role = matrix.name.rpartition(".")[2]
        rows.append(
            {
                "name": matrix.name,
                "layer": matrix.layer,
                "role": role,
                "rows": weight.shape[0],
                "cols": weight.shape[1],
                "zeros": zeros,
            }
        )
    return pandas.DataFrame(rows)


def sizes(model: "PreTrainedModel", folder: Path) -> Sizes:
    """Measure a model that was loaded from a folder."""
    from sparsewav.models.bitmask import stored_bytes
    from sparsewav.pipeline.run_folder import count_parameters

    parameters, nonzero = count_parameters(model)
    dense, bitmask = stored_bytes(model)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Sizes(parameters, nonzero, dense, bitmask, on_disk)


def discrepancies(matrices: "pandas.DataFrame", nonzero: int, run: Path) -> list[str]:
    """Compare a model's zeros with what its run reported.

    Args:
        matrices: as :func:`matrix_sparsities` gives them.
        nonzero: parameters of the whole model that are not zero.
        run: the run's folder.

    Returns:
        A sentence for everything that differs.
    """
    import pandas

    from sparsewav.pipeline import run_folder

    found = []
    metrics = json.loads((run / run_folder.METRICS).read_text())
    if metrics["params_nonzero"] != nonzero:
        found.append(
            f"{run_folder.METRICS} says {metrics['params_nonzero']:,} parameters are not zero; {nonzero:,} are not"
        )
    if (run / run_folder.LAYERS).is_file():
        layers = pandas.read_csv(run / run_folder.LAYERS).set_index("name")
        for row in matrices.itertuples():
            if row.name not in layers.index:
                found.append(f"{run_folder.LAYERS} has no row for {row.name}")
                continue
            reported = round(float(layers.loc[row.name, "sparsity"]) * int(row.rows * row.cols))
            if reported != row.zeros:
                found.append(f"{run_folder.LAYERS} says {reported:,} weights of {row.name} are zero; {row.zeros:,} are")
    return found


def heat_map(matrices: "pandas.DataFrame") -> Table:
    """The sparsity of every matrix, a row a layer, coloured from light to dark."""
    roles = list(dict.fromkeys(matrices["role"]))
    table = Table(title="sparsity in percent", pad_edge=False)
    table.add_column("layer", justify="right")
    for role in roles:
        table.add_column(role.removesuffix("_proj"), justify="right")
    for layer, group in matrices.groupby("layer"):
        cells = {row.role: row.zeros / (row.rows * row.cols) for row in group.itertuples()}
        table.add_row(str(layer), *(_cell(cells.get(role)) for role in roles))
    return table


def _cell(share: float | None) -> Text:
    if share is None:
        return Text("–")
    shade = 255 - round(23 * share)  # of the terminal's grey ramp, 232 black to 255 white
    return Text(f" {100 * share:5.1f} ", style=f"{'white' if shade < 244 else 'black'} on color({shade})")


def plot_heat_map(matrices: "pandas.DataFrame", path: Path) -> None:
    """Draw the sparsity of every matrix to a PNG."""
    from matplotlib.figure import Figure

    from sparsewav.files import write_file

    shares = matrices.assign(share=100 * matrices["zeros"] / (matrices["rows"] * matrices["cols"]))
    grid = shares.pivot(index="layer", columns="role", values="share")[list(dict.fromkeys(matrices["role"]))]
    figure = Figure(figsize=(1.2 + 0.75 * len(grid.columns), 1.6 + 0.28 * len(grid)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(grid.columns)), [role.removesuffix("_proj") for role in grid.columns], rotation=30)
    axes.set_yticks(range(len(grid)), list(grid.index))
    axes.set_ylabel("Layer")
    for row, values in enumerate(grid.to_numpy()):
        for column, value in enumerate(values):
            colour = "black" if value > 60 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="Sparsity, %")
    with write_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def main() -> None:
    """Console entry ``sparsewav-inspect DIR``."""
    parser = argparse.ArgumentParser(
        prog="sparsewav-inspect",
        description="Show a model's size, its sparsity matrix by matrix, and how it was made.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a run or a model, in dense or bitmask format")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="where to draw the heat map (default DIR/sparsity.png)"
    )
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    try:
        raise SystemExit(_inspect(arguments.folder, arguments.plot, console))
    except UserError as error:
        print_error(error)
        raise SystemExit(1) from None


def _inspect(given: Path, plot: Path | None, console: Console) -> int:
    quieten_libraries()
    from sparsewav.models.bitmask import format_of
    from sparsewav.models.load import load, locate_model
    from sparsewav.pipeline import run_folder

    folder = Path(locate_model(str(given.expanduser().absolute()), "the folder"))
    run = next((path for path in (given, given.parent) if (path / run_folder.METRICS).is_file()), None)
    model = load(folder)
    matrices = matrix_sparsities(model)
    measured = sizes(model, folder)
    console.print(_summary(folder, format_of(folder), matrices, measured, str(model.dtype).removeprefix("torch.")))
    if run:
        console.print(_recipe(json.loads((run / run_folder.METRICS).read_text())))
    console.print(heat_map(matrices))
    plot = plot or given / "sparsity.png"
    plot_heat_map(matrices, plot)
    console.print(f"heat map: {plot}", highlight=False)
    if run is None:
        return 0
    wrong = discrepancies(matrices, measured.nonzero, run)
    for sentence in wrong:
        console.print(f"[bold red]not as reported:[/bold red] {sentence}", highlight=False)
    if not wrong:
        console.print("the zeros are those that the run reported", highlight=False)
    return 1 if wrong else 0


def _summary(folder: Path, form: str, matrices: "pandas.DataFrame", measured: Sizes, dtype: str) -> Table:
    table = Table(title=str(folder), show_header=False)
    weights = int((matrices["rows"] * matrices["cols"]).sum())
    rows = {
        "format": f"{form}, {dtype}",
        "parameters": f"{measured.parameters:,}",
        "not zero": f"{measured.nonzero:,}   ({100 * measured.nonzero / measured.parameters:.1f} %)",
        "sparsity": f"{matrices['zeros'].sum() / weights:.4f}   of the transformer's {weights:,} weights",
        "on disk": _megabytes(measured.on_disk),
        "dense": _megabytes(measured.dense),
        "bitmask": f"{_megabytes(measured.bitmask)}   ({100 * measured.bitmask / measured.dense:.1f} % of dense)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _recipe(metrics: dict[str, Any]) -> Table:
    table = Table(title="how it was made", show_header=False)
    for key in _RECIPE:
        value = metrics.get(key)
        if value is not None:
            shown = (
                f"{100 * value:.2f} %" if key.startswith("wer") else f"{value:,}" if key == "updates" else str(value)
            )
            table.add_row(key, shown)
    return table


if __name__ == "__main__":
    main()
