"""Console command ``sparsewav-transcribe``: print transcripts of audio files."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sparsewav.errors import UserError
from sparsewav.files import write_file
from sparsewav.progress import print_error, quieten_libraries, stage

if TYPE_CHECKING:
    from sparsewav.inference.transcription import Transcript

_EPILOG = """examples:
  sparsewav-transcribe talk.mp3                                          the demo's model: English, and small
  sparsewav-transcribe talk.flac --model outputs/RUN                     a run's pruned model
  sparsewav-transcribe *.wav --model outputs/RUN --format json > talks.jsonl
  sparsewav-transcribe one.ogg two.ogg --format srt --output subtitles   subtitles/one.srt, subtitles/two.srt

Any file that libsndfile reads: WAV, FLAC, OGG, MP3; any rate, channels averaged. Long ones are transcribed in chunks
that overlap. Transcripts are greedy CTC without a language model, as in the evaluation.
"""

SUFFIXES = {"text": ".txt", "json": ".jsonl", "srt": ".srt"}


def main() -> None:
    """Console entry ``sparsewav-transcribe FILE...``."""
    arguments = _parse()
    errors = Console(stderr=True, soft_wrap=True)
    if arguments.format == "srt" and len(arguments.files) > 1 and arguments.output is None:
        print_error("several subtitle files cannot share one stream; give their folder: --output FOLDER")
        raise SystemExit(1)
    quieten_libraries()
    from sparsewav.data.utterances import Utterance
    from sparsewav.inference import accelerate
    from sparsewav.inference.transcription import transcribe_recording
    from sparsewav.models.load import choose_device
    from sparsewav.settings.run import Model
    from sparsewav.training.recipes import load_or_train

    try:
        speech = load_or_train(Model(arguments.model), choose_device(arguments.device))
        if arguments.accelerate:
            errors.print(accelerate(speech.model), markup=False, highlight=False)
    except UserError as error:
        print_error(error)
        raise SystemExit(1) from None
    failed = False
    for path in arguments.files:
        try:
            with stage(errors, str(path)) as progress:
                transcript = transcribe_recording(
                    speech,
                    Utterance(path.stem, "", path),
                    chunk_seconds=arguments.chunk,
                    overlap_seconds=arguments.overlap,
                    progress=progress,
                )
            _write(_formatted(transcript, path, arguments), path, arguments)
        except UserError as error:  # the other files are transcribed nevertheless
            print_error(error)
            failed = True
    raise SystemExit(1 if failed else 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sparsewav-transcribe",
        description="Print what is said in audio files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="audio")
    parser.add_argument(
        "--model", default="demo", metavar="DIR", help="folder of a run or a model, or a name on the hub (default demo)"
    )
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="text", help="text (default), json lines or srt")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a file for each audio file there")
    parser.add_argument("--chunk", type=float, default=30.0, metavar="SECONDS", help="length of a chunk (default 30)")
    parser.add_argument("--overlap", type=float, default=4.0, metavar="SECONDS", help="of two chunks (default 4)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    parser.add_argument("--accelerate", action="store_true", help="skip the pruned weights where that is faster (CPU)")
    return parser.parse_args()


def _formatted(transcript: "Transcript", path: Path, arguments: argparse.Namespace) -> str:
    from sparsewav.inference.transcription import as_srt

    if arguments.format == "srt":
        return as_srt(transcript)
    if arguments.format == "json":
        return json.dumps({"file": str(path), **asdict(transcript)}, ensure_ascii=False) + "\n"
    return f"{path}: {transcript.text}\n" if len(arguments.files) > 1 else f"{transcript.text}\n"


def _write(content: str, path: Path, arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        sys.stdout.write(content)
        sys.stdout.flush()
        return
    with write_file(arguments.output / f"{path.stem}{SUFFIXES[arguments.format]}") as temporary:
        temporary.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
