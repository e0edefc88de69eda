"""Console command ``sparsewav-inspect``: size and sparsity of a model, and whether its run reports the same."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsewav.cli.command import command_parser, exit_on_user_error
from sparsewav.progress import quieten_libraries
from sparsewav.settings.pruning import ENCODER, TRANSFORMER

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

_EPILOG = """examples:
  sparsewav-inspect outputs/RUN             the run's model; also checks its zeros against layers.csv and metrics.json
  sparsewav-inspect some/model --plot heat.png
  sparsewav-inspect facebook/wav2vec2-base-100h --revision main      a model on the Hugging Face hub

The exit code is 1 if the model is not what the run's files say.
"""

_SHOWN_METRICS = (
    *("model", "method", "saliency", "solver", "objective", "recovery", "allocation", "scope", "target_sparsity"),
    *("target_megabytes", "target_parameters", "target_macs", "achieved_share"),
    *("asked_speedup", "achieved_speedup"),
    *("finetune_strategy", "updates", "seed", "wer_dense", "wer", "cer_dense", "cer", "divergence"),
)
"""The keys of ``metrics.json`` that are shown."""


def matrix_sparsities(model: "PreTrainedModel", scope: str = TRANSFORMER) -> "pandas.DataFrame":
    """Give a row for every prunable matrix: name, layer, role, rows, cols, zeros, bits and bytes.

    The layer of those in front of the layers is :data:`~sparsewav.pruning.encoder.FRONT`. Bits are those that the
    numbers of a rounded matrix need, and otherwise those of the type; bytes are those that the matrix takes in bitmask
    format.
    """
    import pandas

    from sparsewav.pruning.encoder import prunable_matrices
    from sparsewav.pruning.encoding import coded_bytes
    from sparsewav.pruning.grid import find_grid

    rows = []
    for matrix in prunable_matrices(model, scope):
        zeros = matrix.size - int(matrix.weight.count_nonzero())
        weight = matrix.weight.detach().cpu()
        grid = find_grid(weight)
        sizes = (grid.bits if grid else 8 * weight.itemsize, coded_bytes(weight))
        rows.append((matrix.name, matrix.layer, matrix.role, *weight.shape, zeros, *sizes))
    return pandas.DataFrame(rows, columns=["name", "layer", "role", "rows", "cols", "zeros", "bits", "bytes"])


def discrepancies(model: "PreTrainedModel", matrices: "pandas.DataFrame", run: Path) -> list[str]:
    """Compare the zeros and the sizes of a model with the files in the folder of its run.

    Args:
        model: The model.
        matrices: The result of :func:`matrix_sparsities` for it, of the whole encoder.
        run: The folder of the run.

    Returns:
        A sentence for every difference.
    """
    import pandas

    from sparsewav.pipeline import run_folder
    from sparsewav.pipeline.naming import rounded_to
    from sparsewav.pruning.structure import front_end, structures

    found = []
    metrics = run_folder.read_metrics(run)
    nonzero = run_folder.count_parameters(model)[1]
    if metrics["params_nonzero"] != nonzero:
        found.append(
            f"{run_folder.METRICS} says {metrics['params_nonzero']:,} parameters are not zero; {nonzero:,} are not"
        )
    if (run / run_folder.LAYERS).is_file():
        layers = pandas.read_csv(run / run_folder.LAYERS).set_index("name")
        if "kept" in layers:  # parts were removed whole
            parts = {structure.name: structure.count for structure in structures(model)}
            if "channels" in set(layers["kind"]):
                parts |= {channels.name: channels.count for channels in front_end(model).sets}
            return found + [
                f"{run_folder.LAYERS} says {name} has {kept} {kind}; it has {parts.get(name, 0)}"
                for name, kept, kind in zip(layers.index, layers["kept"], layers["kind"], strict=True)
                if parts.get(name, 0) != kept
            ]
        # A kept weight that is rounded to zero is no part of a matrix's sparsity.
        rounded = rounded_to(metrics)
        pruned = matrices if metrics.get("scope") == ENCODER else behind_front(matrices)
        for row in pruned.itertuples():
            if row.name not in layers.index:
                found.append(f"{run_folder.LAYERS} has no row for {row.name}")
                continue
            reported = round(float(layers.loc[row.name, "sparsity"]) * int(row.rows * row.cols))
            if row.zeros < reported or (row.zeros > reported and not rounded):
                found.append(f"{run_folder.LAYERS} says {reported:,} weights of {row.name} are zero; {row.zeros:,} are")
    return found


def behind_front(matrices: "pandas.DataFrame") -> "pandas.DataFrame":
    """Give the matrices of the layers, without those in front of them."""
    from sparsewav.pruning.encoder import FRONT

    return matrices[matrices["layer"] != FRONT]


def roles_of(matrices: "pandas.DataFrame") -> dict[str, str]:
    """Give the roles in the order of the forward pass, and their names in headings, as short as tells them apart."""
    from sparsewav.pruning.encoder import FRONT
    from sparsewav.pruning.families import FAMILIES

    known = list(dict.fromkeys(name for family in FAMILIES.values() for name in family.prunable))
    places = {name: place for place, name in enumerate(known)}
    # Those in front of the layers are in this order already.
    roles = sorted(dict.fromkeys(matrices["role"]), key=lambda role: places.get(role, FRONT))
    endings = Counter(ending for role in roles for ending in _endings(role))
    names = {role: next(end for end in _endings(role) if endings[end] == 1 or end == role) for role in roles}
    return {role: re.sub(r"linear_|_proj$|_dense$", "", name) for role, name in names.items()}


def _endings(role: str) -> list[str]:
    parts = role.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def heat_map(matrices: "pandas.DataFrame") -> Table:
    """Make a table of the sparsity of every matrix with a row for each layer, coloured from light to dark."""
    return _layer_table("sparsity in percent", matrices, lambda row: _shaded(row.zeros / (row.rows * row.cols)))


def bits_table(matrices: "pandas.DataFrame") -> Table:
    """Make a table of the bits of every matrix: those of a number, and those that a weight takes in bitmask format."""
    return _layer_table(
        "bits of a number, and bits of the file a weight",
        matrices,
        lambda row: f"{row.bits} {8 * row.bytes / (row.rows * row.cols):.2f}",
    )


def _layer_table(title: str, matrices: "pandas.DataFrame", cell: Callable[[Any], str | Text]) -> Table:
    """Make a table with a row for each layer and a column for each role; of what is in front it has a row alone."""
    from sparsewav.pruning.encoder import FRONT

    roles = roles_of(matrices)
    table = Table(title=title, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in roles.values():
        table.add_column(name, justify="right")
    for layer, group in matrices.groupby("layer"):
        cells = {row.role: cell(row) for row in group.itertuples()}
        table.add_row("front" if layer == FRONT else str(layer), *(cells.get(role, "–") for role in roles))
    return table


def _shaded(share: float) -> Text:
    shade = 255 - round(23 * share)  # colours 232 (black) to 255 (white) of a terminal
    return Text(f" {100 * share:5.1f} ", style=f"{'white' if shade < 244 else 'black'} on color({shade})")


def plot_heat_map(matrices: "pandas.DataFrame", path: Path) -> None:
    """Plot the sparsity of the layers' matrices to a PNG."""
    from sparsewav.files import write_file

    with write_file(path) as temporary:
        draw_heat_map(matrices).savefig(temporary, format="png", dpi=150)


def draw_heat_map(matrices: "pandas.DataFrame") -> "Figure":
    """Draw the sparsity of the layers' matrices, a row for each layer and the colours over the range that there is."""
    from matplotlib.figure import Figure

    matrices = behind_front(matrices)
    roles = roles_of(matrices)
    shares = matrices.assign(share=100 * matrices["zeros"] / (matrices["rows"] * matrices["cols"]))
    grid = shares.pivot(index="layer", columns="role", values="share")[list(roles)]
    low, high = shares["share"].min(), shares["share"].max()
    middle, span = (low + high) / 2, max(high - low, 1.0)  # a hundredth of a point is not worth two colours
    figure = Figure(figsize=(1.8 + 0.9 * len(roles), 1.2 + 0.28 * len(grid)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", vmin=middle - span / 2, vmax=middle + span / 2, aspect="auto")
    axes.set_xticks(range(len(roles)), [name.replace(".", "\n") for name in roles.values()], ha="center")
    axes.set_yticks(range(len(grid)), list(grid.index))
    axes.set_ylabel("Layer")
    for row, values in enumerate(grid.to_numpy()):
        for column, value in enumerate(values):
            if value == value:  # a layer may lack a matrix
                colour = "black" if (value - middle) / span > 0.1 else "white"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label=f"Sparsity, % (here {low:.1f} to {high:.1f})")
    return figure


def main() -> None:
    """Console entry ``sparsewav-inspect DIR``."""
    parser = command_parser(
        "sparsewav-inspect",
        "Show a model's size, its sparsity matrix by matrix, and how it was made.",
        _EPILOG,
    )
    parser.add_argument("model", metavar="DIR", help="folder of a run or a model, or a name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit of a name on the hub (default: its main branch)")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="where to draw the heat map (default sparsity.png in DIR, or NAME-sparsity.png here)",
    )
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    with exit_on_user_error():
        raise SystemExit(_inspect(arguments.model, arguments.revision, arguments.plot, console))


def _inspect(name: str, revision: str | None, plot: Path | None, console: Console) -> int:
    quieten_libraries()
    from sparsewav.models.load import find_model
    from sparsewav.pipeline import run_folder

    folder, given = find_model(name, "", revision), Path(name).expanduser()
    run = next((path for path in (given, given.parent) if (path / run_folder.METRICS).is_file()), None)
    model = _load(folder, name)
    matrices = matrix_sparsities(model, ENCODER)
    console.print(_summary(name, folder, model, matrices))
    if run:
        console.print(_origin(run_folder.read_metrics(run)))
    layers = behind_front(matrices)
    front = matrices.drop(layers.index)
    for part in ([front] if front["zeros"].any() else []) + ([layers] if len(layers) else []):
        console.print(heat_map(part))
        console.print(bits_table(part))
    if len(layers):
        plot = plot or (given / "sparsity.png" if given.is_dir() else Path(f"{given.name}-sparsity.png"))
        plot_heat_map(matrices, plot)
        console.print(f"heat map: {plot}", highlight=False)
    if run is None:
        return 0
    wrong = discrepancies(model, matrices, run)
    for sentence in wrong:
        console.print(f"[bold red]not as reported:[/bold red] {sentence}", highlight=False)
    if not wrong:
        console.print("zeros and sizes are those that the run reported", highlight=False)
    return 1 if wrong else 0


def _load(folder: Path, name: str) -> "PreTrainedModel":
    """Load a model in the type that its weights have; PyTorch's files, as the hub has them, in float32."""
    import torch

    from sparsewav.models.load import load_pretrained

    return load_pretrained(str(folder), torch.float32 if _is_pickled(folder) else None, "", name)


def _is_pickled(folder: Path) -> bool:
    from sparsewav.models.checkpoint import weight_files

    return any(path.suffix == ".bin" for path in weight_files(folder))


def _summary(name: str, folder: Path, model: "PreTrainedModel", matrices: "pandas.DataFrame") -> Table:
    from sparsewav.models.bitmask import format_of, stored_bytes
    from sparsewav.models.checkpoint import weight_files
    from sparsewav.pipeline.run_folder import count_parameters
    from sparsewav.pruning.families import left_dense

    table = Table(title=name, show_header=False)
    layers = behind_front(matrices)
    weights = int((layers["rows"] * layers["cols"]).sum())
    front = matrices.drop(layers.index)
    before = int((front["rows"] * front["cols"]).sum())
    parameters, nonzero = count_parameters(model)
    wide, narrow, bitmask = stored_bytes(model)
    format = "PyTorch" if _is_pickled(folder) else format_of(folder)
    left = "; ".join(f"{name} ({reason})" for name, reason in left_dense(model).items())
    rows = {
        "format": f"{format}, {str(model.dtype).removeprefix('torch.')}",
        "parameters": f"{parameters:,}",
        "not zero": f"{nonzero:,}   ({100 * nonzero / parameters:.1f} %)",
        "sparsity": f"{layers['zeros'].sum() / weights:.4f}   of the transformer's {weights:,} weights"
        if weights
        else "no matrices of the transformer are left",
        **(
            {"in front": f"{front['zeros'].sum() / before:.4f}   of the {before:,} weights before it"} if before else {}
        ),
        **({"left dense": f"in every layer {left}"} if left else {}),
        **({"bits": _bits(layers, weights)} if weights else {}),
        "on disk": _megabytes(sum(path.stat().st_size for path in weight_files(folder))),
        "dense float32": _megabytes(wide),
        "dense float16": _megabytes(narrow),
        "bitmask": f"{_megabytes(bitmask)}   ({100 * bitmask / wide:.1f} % of dense float32)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _bits(matrices: "pandas.DataFrame", weights: int) -> str:
    mean = (matrices["bits"] * matrices["rows"] * matrices["cols"]).sum() / weights
    return f"{mean:.2f} of a number, {8 * matrices['bytes'].sum() / weights:.2f} of the bitmask file a weight"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _origin(metrics: dict[str, Any]) -> Table:
    table = Table(title="how it was made", show_header=False)
    for key in _SHOWN_METRICS:
        value = metrics.get(key)
        if value is not None:
            shown = (
                f"{100 * value:.2f} %"
                if key.startswith(("wer", "cer"))
                else f"{value:,}"
                if key == "updates"
                else str(value)
            )
            table.add_row(key, shown)
    return table


if __name__ == "__main__":
    main()
