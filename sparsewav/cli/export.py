"""Console command ``sparsewav-export``: write a model in another format, or for another runtime, and score it there."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsewav.cli.command import add_speech, command_parser, exit_on_user_error
from sparsewav.cli.evaluate import Errors, measure_errors, rates_of, read_speech, show_rates
from sparsewav.errors import UserError
from sparsewav.progress import print_note, print_warning, quieten_libraries, stage
from sparsewav.settings.pruning import Calibration
from sparsewav.settings.run import Model

if TYPE_CHECKING:
    from sparsewav.data.sets import Sets
    from sparsewav.data.utterances import Utterance
    from sparsewav.inference.agreement import Agreement
    from sparsewav.inference.runtime import ExportedModel
    from sparsewav.models.load import SpeechModel
    from sparsewav.settings.data import Data

_EPILOG = """examples:
  sparsewav-export outputs/RUN/model small --dtype float16   numbers of half the size, too
  sparsewav-export small dense --format dense       back, for transformers alone to load
  sparsewav-export outputs/RUN run-onnx --format onnx             pip install 'sparsewav[onnx]'
  sparsewav-export outputs/RUN run-int8 --format openvino --int8  pip install 'sparsewav[openvino]'
  sparsewav-export demo demo-onnx --format onnx --data data=manifest data.test=dev.tsv data.calibration=train.tsv

A folder in bitmask format holds model.bitmask.safetensors; sparsewav.load("small") gives back the model.

onnx and openvino are for other runtimes, in float32 or, with --int8, quantised by the runtime's own tool. Such a file
is compared with the model, and transcribes the evaluation set of the run (or of --data) with its own runtime, before it
appears; its error rates are printed beside those of the dense model and of SRC. sparsewav-transcribe and
sparsewav-evaluate run it.
"""

FORMATS = ("dense", "bitmask", "onnx", "openvino")
SECONDS_PER_BATCH = 60.0
"""Most audio in a batch of the evaluation, padding included; as of a run, which left hypotheses of it in the cache."""
COMPARED = 20
"""Utterances at most whose logits are compared."""


def main() -> None:
    """Console entry ``sparsewav-export SRC DST``."""
    arguments = _parse()
    quieten_libraries()
    with exit_on_user_error("nothing was written, and what was transcribed is kept"):
        if arguments.format in FORMATS[:2]:
            _export(arguments)
        else:
            _exchange(arguments)


def _parse() -> argparse.Namespace:
    parser = command_parser(
        "sparsewav-export",
        "Write a pruned model in another format: bitmask stores no zeros, and rounded weights in few bits; dense is a "
        "plain checkpoint; onnx and openvino are for other runtimes.",
        _EPILOG,
    )
    parser.add_argument(
        "source", metavar="SRC", help="folder of a run or a model in either format, or a name on the hub"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write; must not be there yet")
    parser.add_argument("--format", choices=FORMATS, default="bitmask", help="default: bitmask")
    parser.add_argument(
        "--dtype",
        choices=("model", "float16"),
        default="model",
        help="model (default) keeps every bit; float16 rounds, and is refused where that makes a bitmask file larger",
    )
    exchange = parser.add_argument_group("of onnx and openvino")
    exchange.add_argument("--int8", action="store_true", help="quantise with the runtime's own tool")
    add_speech(exchange, "that of SRC's run")
    exchange.add_argument("--no-score", action="store_true", help="compare the logits on noise alone, not on speech")
    return parser.parse_args()


def _export(arguments: argparse.Namespace) -> None:
    """Write a dense checkpoint, or one in bitmask format."""
    from sparsewav.models.bitmask import export  # imported here, so that --help does not wait for PyTorch
    from sparsewav.models.load import find_model

    for option, given in (("--int8", arguments.int8), ("--data", arguments.data), ("--no-score", arguments.no_score)):
        if given:
            raise UserError(f"{option} is for --format onnx and openvino; leave it out, or choose one of them")
    source = find_model(arguments.source, "")
    folder = export(source, arguments.destination, arguments.format, arguments.dtype)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    Console(soft_wrap=True).print(
        f"{folder}: {written / 1e6:,.1f} MB of weights in {arguments.format} format", highlight=False
    )


def _exchange(arguments: argparse.Namespace) -> None:
    """Write a model for another runtime, after it was scored there."""
    from sparsewav.cli.app import recorded_settings
    from sparsewav.files import write_folder
    from sparsewav.inference.agreement import agreement
    from sparsewav.inference.exchange import check_libraries, write_exchange, write_record
    from sparsewav.inference.runtime import load_exported
    from sparsewav.models.load import locate_model
    from sparsewav.training.recipes import load_or_train

    console, destination = Console(), arguments.destination.expanduser()
    if arguments.dtype != "model":
        raise UserError(f"--dtype {arguments.dtype} is for dense and bitmask; leave it out, or quantise with --int8")
    if destination.exists():
        raise UserError(f"{destination} is there already; delete it or choose another folder")
    scored, calibrated = not arguments.no_score, arguments.int8 and arguments.format == "openvino"
    if arguments.data and not (scored or calibrated):
        raise UserError("with --no-score no speech is read; leave out --data")
    check_libraries(arguments.format, int8=arguments.int8)
    locate_model(arguments.source, key="")  # before any speech is read or spoken
    run = _run_of(arguments.source)
    if scored or calibrated:
        try:
            data, sets, evaluation = read_speech(arguments.data, run)
        except UserError as error:
            without = "" if calibrated else ", or leave the file unscored: --no-score"
            raise UserError(f"{error}{without}") from error
    speech = load_or_train(Model(arguments.source), key="")
    for warning in speech.warnings:
        print_warning(warning)
    if not speech.writes:
        raise UserError(f"{arguments.source} is an encoder without a CTC head; only CTC models are exported")
    settings: dict[str, Any] = recorded_settings(run) or {}
    called = f"{arguments.format}{', int8' if arguments.int8 else ''}"
    found, sizes = _references(speech, run, settings, evaluation, data, console) if scored else ([], {})
    calibration = None
    if arguments.int8:
        calibration = _calibration(speech, sets, settings) if calibrated else []
    with write_folder(destination) as folder:
        with stage(console, f"Writing {called}"):
            exported = write_exchange(speech, folder, arguments.format, calibration)
        record: dict[str, Any] = {"scored": scored}
        if scored:
            own = load_exported(folder)
            found.append(measure_errors(called, own, evaluation, data, SECONDS_PER_BATCH, console))
            batches = _few(speech, [utterance for utterances in evaluation.values() for utterance in utterances])
            agrees = agreement(speech, exported, batches)
            record |= _report(found, sizes, exported, agrees, console)
        write_record(folder, speech, exported, int8=arguments.int8, figures=record)
    console.print(f"Written: {destination}", soft_wrap=True, highlight=False)
    if not scored:
        before = ", before int8" if arguments.int8 else ""
        print_warning(f"the file was not scored; its logits were compared with the model's on noise alone{before}")


def _run_of(source: str) -> str:
    """Give the folder of the run that a model belongs to, if it is in one; otherwise the model."""
    from sparsewav.pipeline.naming import SETTINGS

    folder = Path(source).expanduser()
    return str(next((path for path in (folder, folder.parent) if (path / SETTINGS).is_dir()), source))


def _references(
    speech: "SpeechModel",
    run: str,
    settings: dict[str, Any],
    evaluation: "dict[str, list[Utterance]]",
    data: "Data",
    console: Console,
) -> tuple[list[list[Errors]], dict[str, int]]:
    """Measure the dense model of the run, where it is still there, and the model that is exported.

    Returns:
        Their errors on every set, and the bytes of their weights by their names.
    """
    from sparsewav.models.checkpoint import weight_files
    from sparsewav.training.recipes import load_or_train

    found, sizes = [], {}
    models = {f"{Path(run).absolute().name} (PyTorch)": speech}
    if "model" in settings:  # a training of a dense model has none
        try:
            dense = load_or_train(Model(**settings["model"]))
            models = {f"dense ({dense.name})": dense} | models
        except (UserError, TypeError) as error:  # of another version, whose options have other names
            print_warning(f"the dense model of {run} is left out: {error}")
    for name, model in models.items():
        found.append(measure_errors(name, model, evaluation, data, SECONDS_PER_BATCH, console))
        sizes[name] = sum(path.stat().st_size for path in weight_files(model.folder)) if model.folder else 0
    return found, sizes


def _few(speech: "SpeechModel", utterances: "list[Utterance]", seconds_per_batch: float = 10.0) -> Any:
    """Give batches of the first utterances, whose transcripts are not read."""
    from dataclasses import replace

    from sparsewav.data.batches import SpeechBatches
    from sparsewav.pruning.encoder import takes_padding

    few = [replace(utterance, text="") for utterance in utterances[:COMPARED]]
    return SpeechBatches(few, speech.processor, seconds_per_batch, padding=takes_padding(speech.model))


def _calibration(speech: "SpeechModel", sets: "Sets", settings: dict[str, Any]) -> Any:
    """Give the calibration set of the run, or that of the defaults, an utterance at a time."""
    from sparsewav.data.sets import refuse_unreadable
    from sparsewav.inference.exchange import CALIBRATED, int8_calibration

    count = settings.get("calibration", {}).get("utterances", Calibration().utterances)
    sets.leave_calibration_unlabelled(["evaluation"])
    utterances = sets.calibration(min(count, CALIBRATED), settings.get("seed", 0), fewer=True)
    refuse_unreadable(utterances)
    print_note(
        f"int8 is calibrated on {len(utterances)} utterances of {'='.join(map(str, sets.data.subset('calibration')))}"
    )
    return int8_calibration(speech, utterances)


def _report(
    found: list[list[Errors]],
    sizes: dict[str, int],
    exported: "ExportedModel",
    agrees: "Agreement",
    console: Console,
) -> dict[str, Any]:
    """Print the error rates side by side and what else the file is, warn of what is wrong, and give the figures."""
    import pandas

    from sparsewav.inference.exchange import size_of

    ours = {errors.set: errors for errors in found[-2]}
    rates = pandas.DataFrame([rates_of(errors, ours[errors.set]) for model in found for errors in model])
    for name, errors in ours.items():
        show_rates(rates[rates["set"] == name], errors.utterances, console, "to PyTorch")
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("MB", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in found:
        size = sizes.get(model[0].model, size_of(exported))
        table.add_row(escape(model[0].model), f"{size / 1e6:,.2f}", f"{model[0].seconds:.1f}")
    console.print(table)
    console.print(
        f"Seconds are those of transcribing all sets, now or when it was first done. Logits of {COMPARED} utterances "
        f"at most: largest difference {agrees.difference:.1e} of the largest logit, the same token in "
        f"{agrees.same:.2%} of the frames. Of the pruned weights {agrees.zeros_kept:.2%} are zero in the file.",
        soft_wrap=True,
        highlight=False,
    )
    if agrees.found < 1:
        print_note(f"{1 - agrees.found:.1%} of the prunable matrices are folded into constants of the file")
    if agrees.zeros_kept < 1:
        print_warning(f"{1 - agrees.zeros_kept:.2%} of the pruned weights are not zero in the file")
    last = found[-1][0].model
    for row in rates[rates["model"] == last].to_dict("records"):
        if row["wer_difference_low"] > 0:
            print_warning(
                f"on {row['set']} the exported model has a WER of {row['wer']:.2%}, {row['wer_difference']:.2%} above "
                f"that of PyTorch (95 % interval {row['wer_difference_low']:.2%} to {row['wer_difference_high']:.2%}); "
                "choose the other format, or leave out --int8"
            )
    return {
        "rates": json.loads(rates.to_json(orient="records", double_precision=15)),
        "seconds": {model[0].model: model[0].seconds for model in found},
        "bytes": size_of(exported),
        "agreement": vars(agrees),
    }


if __name__ == "__main__":
    main()
