"""Console command ``sparsewav-push``: publish the model of a run on the Hugging Face hub."""

from pathlib import Path

from rich.console import Console

from sparsewav.cli.command import command_parser, exit_on_user_error
from sparsewav.progress import quieten_libraries, stage

_EPILOG = """examples:
  sparsewav-push outputs/RUN my-pruned-model --private           as <your account>/my-pruned-model
  sparsewav-push outputs/RUN me/my-pruned-model --license apache-2.0 --language en
  sparsewav-push outputs/RUN me/my-pruned-model --format bitmask --branch bitmask
  sparsewav-push outputs/RUN me/my-pruned-model --dry-run        print the card and the files, publish nothing

The token is that of HF_TOKEN, or of hf auth login; it must be allowed to write. What is published is model/ with its
card, which has the run's figures and may be edited before, and layers.csv. Licence and language are those that the card
of the dense model states; where it states none, you have to know them.
"""


def main() -> None:
    """Console entry ``sparsewav-push RUN NAME``."""
    parser = command_parser(
        "sparsewav-push",
        "Publish the model of a run, with its card, on the Hugging Face hub.",
        _EPILOG,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("name", metavar="NAME", help="of the repository, with or without its owner; made if not there")
    parser.add_argument("--private", action="store_true", help="make a repository that nobody else sees")
    parser.add_argument("--license", metavar="ID", help="licence for the card, as the hub writes it, e.g. apache-2.0")
    parser.add_argument("--language", metavar="CODE", help="language for the card, e.g. en")
    parser.add_argument("--format", choices=("dense", "bitmask"), default="dense", help="default: dense")
    parser.add_argument(
        "--dtype", choices=("model", "float16"), default="model", help="model (default) keeps every bit; float16 rounds"
    )
    parser.add_argument("--branch", help="to commit to (default main); made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the files, and publish nothing")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    quieten_libraries()
    from sparsewav.pipeline.publish import prepare, publish  # so that --help does not wait for PyTorch

    with exit_on_user_error():
        stated = {"license": arguments.license, "language": arguments.language}
        with prepare(arguments.run, arguments.format, arguments.dtype, stated) as files:
            if arguments.dry_run:
                console.print(files["README.md"].read_text(encoding="utf-8"), markup=False, highlight=False)
            for name, path in files.items():
                console.print(f"{path.stat().st_size / 1e6:10,.2f} MB  {name}", markup=False, highlight=False)
            if arguments.dry_run:
                return
            with stage(console, f"Publishing {arguments.name}"):
                url = publish(files, arguments.name, private=arguments.private, branch=arguments.branch)
            console.print(url, markup=False, highlight=False)


if __name__ == "__main__":
    main()
