"""Console command ``sparsewav-evaluate``: error rates of models on any speech, with intervals, compared in pairs."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsewav.cli.command import add_speech, command_parser, exit_on_user_error
from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.progress import print_note, print_warning, quieten_libraries
from sparsewav.settings.data import Data
from sparsewav.settings.run import Model, device_faults

if TYPE_CHECKING:
    import numpy as np
    import pandas

    from sparsewav.data.sets import Sets
    from sparsewav.data.utterances import Utterance
    from sparsewav.models.load import SpeechModel

_EPILOG = """examples:
  sparsewav-evaluate outputs/RUN demo                                   on the speech that the run was evaluated on
  sparsewav-evaluate outputs/A outputs/B --data data.evaluation_subset=[test-clean,test-other]
  sparsewav-evaluate outputs/A outputs/B --data data=librispeech_dir data.root=/data/LibriSpeech
  sparsewav-evaluate outputs/A outputs/B --output errors.csv

A MODEL is the folder of a run or of a model, exported or not, a name on the hub, or demo. Speech is named as for
sparsewav; what --data does not say is that of the first MODEL's run. The difference of every model to the first one is
paired: both are measured on the same samples of utterances, and of speakers where they are known. Spaces count in the
CER.
"""

UNITS = {"wer": "words", "cer": "characters"}
"""What every error rate counts."""

FEW = 10
"""With fewer speakers than this, resampling them shows less variance than there is."""


def main() -> None:
    """Console entry ``sparsewav-evaluate MODEL...``."""
    arguments = _parse()
    quieten_libraries()
    with exit_on_user_error("what was transcribed is kept, and the same command goes on"):
        _evaluate(arguments)


def _parse() -> argparse.Namespace:
    parser = command_parser(
        "sparsewav-evaluate",
        "Measure word and character error rates of models, with their 95 % intervals.",
        _EPILOG,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the first one is what the others are compared with")
    add_speech(parser, "that of the first MODEL's run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=".csv: a row for every model and utterance, with hypothesis and errors; .json: the same beside the rates",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="most audio in a batch, padding included (default 60)"
    )
    return parser.parse_args()


@dataclass
class Errors:
    """What one model wrote on one set, and its errors in words and in characters.

    Attributes:
        model, set: Their names.
        utterances: With transcripts as the model can write them.
        hypotheses: In the order of the utterances.
        edits, lengths: Number of edits, and of words or characters in the reference, of every utterance, by the rate.
        seconds: What transcribing all sets took, now or when it was first done.
    """

    model: str
    set: str
    utterances: "list[Utterance]"
    hypotheses: list[str]
    edits: "dict[str, np.ndarray]"
    lengths: "dict[str, np.ndarray]"
    seconds: float


def _evaluate(arguments: argparse.Namespace) -> None:
    import pandas

    from sparsewav.inference.runtime import exported_file, load_runnable
    from sparsewav.models.load import choose_device, locate_model

    console = Console()
    if arguments.output and arguments.output.suffix not in (".csv", ".json"):
        raise UserError(f"--output {arguments.output} must end with .csv or .json")
    for fault in device_faults(arguments.device):
        raise UserError(f"--{fault}")
    if not arguments.seconds > 0:
        raise UserError(f"--seconds {arguments.seconds:g} must be above 0")
    if repeated := {name for name in arguments.models if arguments.models.count(name) > 1}:
        raise UserError(f"{', '.join(sorted(repeated))} is named twice; name every model once")
    choose_device(arguments.device)  # this and the next before anything is read or spoken
    for name in arguments.models:
        if exported_file(name) is None:
            locate_model(name, key="")
    data, _, evaluation = read_speech(arguments.data, arguments.models[0])
    found: list[Errors] = []
    for name in arguments.models:
        speech = load_runnable(Model(name), arguments.device)
        for warning in speech.warnings:
            print_warning(warning)
        if not speech.writes:
            raise UserError(f"{name} is an encoder without a CTC head and writes no text; leave it out")
        found += measure_errors(name, speech, evaluation, data, arguments.seconds, console)
        del speech  # before the next one is loaded
    first = {errors.set: errors for errors in found if errors.model == arguments.models[0]}
    table = pandas.DataFrame([rates_of(errors, first[errors.set]) for errors in found])
    if arguments.output:
        _write(arguments.output, found, table, data)
    for name, errors in first.items():
        show_rates(table[table["set"] == name], errors.utterances, console)
    if arguments.output:
        console.print(f"Written: {arguments.output}", soft_wrap=True)


def read_speech(words: list[str], model: str) -> "tuple[Data, Sets, dict[str, list[Utterance]]]":
    """Give the options of data that a command line names upon those of a model's run, the sets, and what is evaluated.

    Raises:
        UserError: As :func:`~sparsewav.cli.app.data_of_words` does, or speech is missing or broken.
    """
    from sparsewav.cli.app import data_of_words
    from sparsewav.data.sets import Sets, refuse_unreadable

    data = data_of_words(words, model)
    if not any(word.startswith("data=") for word in words):
        print_note(f"the speech is that of {model}: {'='.join(map(str, data.subset('evaluation')))}")
    sets = Sets(data)
    evaluation = sets.evaluation()
    for note in sets.recognised():
        print_note(note)
    for note in sets.left_out():
        print_warning(note)
    refuse_unreadable(utterance for utterances in evaluation.values() for utterance in utterances)
    return data, sets, evaluation


def measure_errors(
    name: str,
    speech: "SpeechModel",
    evaluation: "Mapping[str, list[Utterance]]",
    data: Data,
    seconds_per_batch: float,
    console: Console,
) -> list[Errors]:
    """Transcribe every set with one model, or take its hypotheses from the cache, and count the errors."""
    from sparsewav.data.batches import check_labels, check_lengths
    from sparsewav.data.text import choose_normalization, normalized
    from sparsewav.inference.wer import count_edits
    from sparsewav.pipeline.shared_statistics import evaluate_model, identity_of

    texts = (utterance.text for utterances in evaluation.values() for utterance in utterances)
    how, notes = choose_normalization(texts, speech.processor.tokenizer, data.case, data.remove_characters)
    for note in notes:
        print_note(f"{name}: {note}")
    evaluation = {of: normalized(utterances, how) for of, utterances in evaluation.items()}
    check_labels([utterance for utterances in evaluation.values() for utterance in utterances], speech.processor, how)
    for utterances in evaluation.values():
        check_lengths(utterances, speech.model, speech.processor, labels=False)
    identity = identity_of(speech, seconds_per_batch)
    result = evaluate_model(speech, name, evaluation, how, identity, console, enabled=True)
    found = []
    for of, utterances in evaluation.items():
        references, hypotheses = [utterance.text for utterance in utterances], result.hypotheses[of]
        counted = {rate: count_edits(references, hypotheses, characters=rate == "cer") for rate in UNITS}
        edits, lengths = ({rate: pair[index] for rate, pair in counted.items()} for index in (0, 1))
        found.append(Errors(name, of, utterances, hypotheses, edits, lengths, result.seconds))
    return found


def rates_of(errors: Errors, first: Errors) -> dict[str, str | int | float | None]:
    """Give the error rates of a model with their intervals, and their differences to those of the first one.

    Raises:
        UserError: The two have references of different lengths.
    """
    from sparsewav.inference.bootstrap import bootstrap_difference, bootstrap_rate

    voices = _speakers(errors.utterances)
    row: dict[str, str | int | float | None] = {"model": errors.model, "set": errors.set}
    row["n_utterances"] = len(errors.utterances)
    for rate in UNITS:
        edits, lengths = errors.edits[rate], errors.lengths[rate]
        figures = {rate: bootstrap_rate(edits, lengths, voices), f"{rate}_difference": None}
        if errors is not first:
            if (lengths != first.lengths[rate]).any():
                raise UserError(
                    f"{first.model} and {errors.model} write the transcripts of {errors.set} with different numbers of "
                    f"{UNITS[rate]}, so that their errors make no pairs; let data.case be the same for both, or "
                    "evaluate each for itself"
                )
            figures[f"{rate}_difference"] = bootstrap_difference(edits[None], first.edits[rate][None], lengths, voices)
        for key, figure in figures.items():
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), figure or (None, None, None), strict=True))
    return row


def _speakers(utterances: "list[Utterance]") -> list[str] | None:
    """Give the speaker of every utterance; None if one is not known, or there is one alone."""
    speakers = [utterance.speaker for utterance in utterances if utterance.speaker is not None]
    return speakers if len(speakers) == len(utterances) and len(set(speakers)) > 1 else None


def _write(path: Path, found: list[Errors], table: "pandas.DataFrame", data: Data) -> None:
    """Write a row for every model and utterance as CSV, or with the rates and the options of data as JSON."""
    import pandas

    rows = [
        {"model": errors.model, "set": errors.set, "id": utterance.id, "speaker": utterance.speaker}
        | {"reference": utterance.text, "hypothesis": hypothesis}
        | {unit: int(errors.lengths[rate][index]) for rate, unit in UNITS.items()}
        | {f"{unit}_wrong": int(errors.edits[rate][index]) for rate, unit in UNITS.items()}
        for errors in found
        for index, (utterance, hypothesis) in enumerate(zip(errors.utterances, errors.hypotheses, strict=True))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_file(path) as temporary:
        if path.suffix == ".csv":
            pandas.DataFrame(rows).to_csv(temporary, index=False)
        else:
            rates = json.loads(table.to_json(orient="records", double_precision=15))
            record = {"data": asdict(data), "rates": rates, "utterances": rows}
            temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show_rates(
    table: "pandas.DataFrame", utterances: "list[Utterance]", console: Console, against: str = "to the first"
) -> None:
    """Print the rates on one set, the differences to those of one model, and what the intervals are drawn over."""
    import pandas

    from sparsewav.inference.bootstrap import RESAMPLES

    shown = Table(title=str(table["set"].iloc[0]), box=box.SIMPLE, pad_edge=False)
    shown.add_column("model", overflow="fold")
    keys = {"wer": "WER %", "cer": "CER %"}
    if len(table) > 1:
        keys = {"wer": "WER %", "wer_difference": against, "cer": "CER %", "cer_difference": against}
    for heading in keys.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    last = [Path(model).name for model in table["model"]]
    names = last if len(set(last)) == len(last) else list(table["model"])
    for name, row in zip(names, table.to_dict("records"), strict=True):
        cells = []
        for key in keys:
            value, low, high = row[key], row[f"{key}_low"], row[f"{key}_high"]
            form = "+.2f" if key.endswith("difference") else ".2f"
            figures = [format(100 * figure, form) for figure in (value, low, high)]
            cells.append("" if pandas.isna(value) else f"{figures[0]}\n{figures[1]} to {figures[2]}")
        shown.add_row(escape(name), *cells)
    console.print(shown)
    voices = _speakers(utterances)
    drawn = f"{len(utterances):,} utterances" + (f" of {len(set(voices)):,} speakers" if voices else "")
    few = "; so few speakers make it too narrow" if voices and len(set(voices)) < FEW else ""
    unknown = "" if voices else "; speakers are not drawn, as the data names none, one alone, or not all"
    console.print(
        f"Below each figure its 95 % interval, from {RESAMPLES:,} samples of the {drawn}{few}{unknown}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
