"""Console command ``sparsewav-transcribe``: print transcripts of audio files."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sparsewav.cli.command import command_parser, end_without_reader, exit_on_user_error
from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.progress import print_error, quieten_libraries, stage
from sparsewav.settings.run import Model, device_faults

if TYPE_CHECKING:
    from sparsewav.data.utterances import Utterance
    from sparsewav.inference.transcription import Transcript
    from sparsewav.models.load import SpeechModel

_EPILOG = """examples:
  sparsewav-transcribe talk.mp3                                          the demo's model: English, and small
  sparsewav-transcribe talk.flac --model outputs/RUN                     a run's pruned model
  sparsewav-transcribe talk.flac --model small-onnx/model.onnx           a model that was exported
  sparsewav-transcribe *.wav --model outputs/RUN --format json > talks.jsonl
  sparsewav-transcribe one.ogg two.ogg --format srt --output subtitles   subtitles/one.srt, subtitles/two.srt

  ffmpeg -i talk.m4a -f wav - | sparsewav-transcribe -                    audio from a pipe

Any file that libsndfile reads: WAV, FLAC, OGG, MP3; any rate, channels averaged. Long ones are transcribed in chunks
that overlap. Transcripts are greedy CTC without a language model, as in the evaluation. A file written to --output has
the name of its audio, with as much of the path before it as tells it from the others.
"""

SUFFIXES = {"text": ".txt", "json": ".jsonl", "srt": ".srt"}
STDIN = ("-", "/dev/stdin")
"""What stands for the standard input among the files."""
MOST_PIPED = 2**31
"""Bytes that are taken from a pipe, which may never end: 18 hours at 16 kHz."""


def main() -> None:
    """Console entry ``sparsewav-transcribe FILE...``."""
    arguments = _parse()
    quieten_libraries()
    from sparsewav.inference import accelerate
    from sparsewav.inference.runtime import exported_file, load_runnable
    from sparsewav.inference.transcription import check_chunks

    errors = Console(stderr=True, soft_wrap=True)
    with exit_on_user_error():
        outputs = _outputs(arguments)
        check_chunks(arguments.chunk, arguments.overlap)
        for fault in device_faults(arguments.device):
            raise UserError(f"--{fault}")
        if arguments.accelerate and exported_file(arguments.model):
            raise UserError("--accelerate is for models that PyTorch runs; leave it out for an exported one")
        speech = load_runnable(Model(arguments.model, revision=arguments.revision), arguments.device)
        if arguments.accelerate:
            errors.print(str(accelerate(speech.model)), markup=False, highlight=False)
    failed = False
    for name, output in zip(arguments.files, outputs, strict=True):
        try:
            _transcribe(name, output, speech, arguments, errors)
        except BrokenPipeError:
            end_without_reader()
        except Exception as error:  # whatever is wrong with one file, the others are transcribed nevertheless
            reason = " ".join(str(error).split())
            print_error(reason if isinstance(error, UserError) else f"{name}: {type(error).__name__}: {reason}")
            failed = True
    raise SystemExit(1 if failed else 0)


def _transcribe(
    name: str, output: Path | None, speech: "SpeechModel", arguments: argparse.Namespace, errors: Console
) -> None:
    """Transcribe a file and write the transcript to the output, or to the standard output where there is none."""
    from sparsewav.inference.transcription import transcribe_recording

    with stage(errors, name) as progress:
        transcript = transcribe_recording(
            speech,
            _recording(name),
            chunk_seconds=arguments.chunk,
            overlap_seconds=arguments.overlap,
            progress=progress,
        )
    content = _formatted(transcript, name, arguments)
    if output is None:
        sys.stdout.write(content)
        sys.stdout.flush()
        return
    with write_file(output) as temporary:
        temporary.write_text(content, encoding="utf-8")


def _recording(name: str) -> "Utterance":
    """Give the audio of a file; what comes through a pipe is read to its end, because it cannot be read again.

    Raises:
        UserError: It is no file, a pipe brings nothing or too much, or nothing was piped in.
    """
    from sparsewav.data.utterances import Utterance

    path = Path(name)
    if name not in STDIN:
        if not path.exists():
            raise UserError(f"{name} does not exist; check the path")
        if path.is_file():
            return Utterance(name, "", path)
        if not (path.is_fifo() or path.is_socket()):
            raise UserError(f"{name} is neither a file nor a pipe; give an audio file")
    elif sys.stdin.isatty():
        raise UserError(f"{name} stands for audio from a pipe, and there is none; give a file, or pipe audio in")
    with open(0, "rb", closefd=False) if name in STDIN else path.open("rb") as pipe:
        contents = b"".join(islice(iter(partial(pipe.read, 2**20), b""), MOST_PIPED // 2**20 + 1))
    if not contents:
        raise UserError(f"{name} has brought nothing; check the command before the pipe")
    if len(contents) > MOST_PIPED:
        raise UserError(f"{name} has brought more than {MOST_PIPED / 2**30:g} GiB; write it to a file first")
    return Utterance(name, "", contents)


def _outputs(arguments: argparse.Namespace) -> list[Path | None]:
    """Give the file that each transcript is written to; None for the standard output.

    Raises:
        UserError: There is no way to keep the transcripts apart.
    """
    files = arguments.files
    if sum(name in STDIN for name in files) > 1:
        raise UserError("the standard input can be read once; name it once")
    if arguments.output is None:
        if arguments.format == "srt" and len(files) > 1:
            raise UserError("several subtitle files cannot share one stream; give their folder: --output FOLDER")
        return [None] * len(files)
    paths = [Path("/stdin" if name in STDIN else os.path.abspath(name)) for name in files]
    names = [_names(path) for path in paths]
    chosen = [0] * len(files)
    while True:
        taken: dict[str, list[int]] = {}
        for index, choice in enumerate(chosen):
            taken.setdefault(names[index][choice].casefold(), []).append(index)
        clashes = [indices for indices in taken.values() if len(indices) > 1]
        if not clashes:
            return [
                arguments.output / f"{names[index][choice]}{SUFFIXES[arguments.format]}"
                for index, choice in enumerate(chosen)
            ]
        for indices in clashes:
            for index in indices:
                chosen[index] += 1
                if chosen[index] == len(names[index]):
                    same = " and ".join(files[other] for other in indices)
                    raise UserError(f"{same} would be written to one file; give each once, or an --output of its own")


def _names(path: Path) -> list[str]:
    """Give names for the transcript of a file, from its stem to its whole path: talk, talk.mp3, day/talk, ..."""
    folders = path.parent.parts[1:]
    return [
        "/".join((*folders[len(folders) - depth :], name))
        for depth in range(len(folders) + 1)
        for name in (path.stem, path.name)
    ]


def _parse() -> argparse.Namespace:
    parser = command_parser(
        "sparsewav-transcribe",
        "Print what is said in audio files.",
        _EPILOG,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio; - reads it from a pipe")
    parser.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help="folder of a run or a model, an exported model (its folder or file), or a name on the hub (default demo)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a name on the hub (default: its main branch)")
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="text", help="text (default), json lines or srt")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a file for each audio file there")
    parser.add_argument("--chunk", type=float, default=30.0, metavar="SECONDS", help="length of a chunk (default 30)")
    parser.add_argument("--overlap", type=float, default=4.0, metavar="SECONDS", help="of two chunks (default 4)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument("--accelerate", action="store_true", help="skip the pruned weights where that is faster (CPU)")
    return parser.parse_args()


def _formatted(transcript: "Transcript", name: str, arguments: argparse.Namespace) -> str:
    from sparsewav.inference.transcription import as_srt

    if arguments.format == "srt":
        return as_srt(transcript)
    if arguments.format == "json":
        return json.dumps({"file": name, **asdict(transcript)}, ensure_ascii=False) + "\n"
    return f"{name}: {transcript.text}\n" if len(arguments.files) > 1 else f"{transcript.text}\n"


if __name__ == "__main__":
    main()
