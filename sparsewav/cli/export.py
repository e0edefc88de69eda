"""Console command ``sparsewav-export``: write a model in another format."""

from rich.console import Console

from sparsewav.cli.command import command_parser, exit_on_user_error

_EPILOG = """examples:
  sparsewav-export outputs/RUN/model small --dtype float16   numbers of half the size, too
  sparsewav-export small dense --format dense       back, for transformers alone to load

A folder in bitmask format holds model.bitmask.safetensors; sparsewav.load("small") gives back the model.
"""


def main() -> None:
    """Console entry ``sparsewav-export SRC DST``."""
    parser = command_parser(
        "sparsewav-export",
        "Write a pruned model in another format: bitmask stores no zeros, and rounded weights in few bits; dense is a "
        "plain checkpoint.",
        _EPILOG,
    )
    parser.add_argument(
        "source", metavar="SRC", help="folder of a run or a model in either format, or a name on the hub"
    )
    parser.add_argument("destination", metavar="DST", help="folder to write; must not be there yet")
    parser.add_argument("--format", choices=("dense", "bitmask"), default="bitmask", help="default: bitmask")
    parser.add_argument(
        "--dtype",
        choices=("model", "float16"),
        default="model",
        help="model (default) keeps every bit; float16 rounds, and is refused where that makes a bitmask file larger",
    )
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    from sparsewav.models.bitmask import export  # imported here, so that --help does not wait for PyTorch
    from sparsewav.models.load import find_model

    with exit_on_user_error():
        source = find_model(arguments.source, "SRC")
        folder = export(source, arguments.destination, arguments.format, arguments.dtype)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    console.print(f"{folder}: {written / 1e6:,.1f} MB of weights in {arguments.format} format", highlight=False)


if __name__ == "__main__":
    main()
