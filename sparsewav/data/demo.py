"""The demo corpus: speech of eSpeak NG in LibriSpeech's layout, made on first use and kept in the user's cache.

eSpeak NG carries state from one utterance to the next. Each subset is therefore cut into shards of fixed size, and a
fresh process (this module, run as a script) speaks each shard, so that a subset has the same bytes for the same seed
with any number of processes.
"""

import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from rich.console import Console

from sparsewav.data import espeak
from sparsewav.data.sentences import draw_sentence
from sparsewav.errors import UserError
from sparsewav.files import CHECKSUMS, cache_folder, damage, locked, write_checksums, write_folder
from sparsewav.progress import print_warning, stage

SAMPLE_RATE = 16_000
UTTERANCES_PER_SHARD = 500
VERSION = 1
"""Part of the name of the cached folder, to be increased when a change here changes the audio of a seed."""

TEST_VOICES = ("m3", "m7", "f2", "f5", "linda", "paul", "Michael", "benjamin")
DEVELOPMENT_VOICES = ("m6", "f4", "robert", "steph2")
TRAINING_VOICES = (
    *("m1", "m2", "m4", "m5", "m8", "f1", "f3"),
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky"),
    *("Lee", "Marco", "Mario", "Mike", "Nguyen", "Reed", "adam", "anika", "antonio", "aunty", "belinda", "boris"),
    *("caleb", "david", "ed", "edward", "edward2", "grandma", "grandpa", "gustave", "ian", "john", "marcelo", "max"),
    *("michel", "miguel", "mike2", "norbert", "pablo", "pedro", "quincy", "rob", "sandro", "shelby"),
    *("steph", "steph3", "travis", "victor", "zac", "iven", "iven2", "iven3", "iven4", "announcer"),
)


@dataclass(frozen=True)
class DemoSubset:
    """A subset of the demo corpus: the number of utterances, their voices, and the side of the sentence split."""

    name: str
    utterances: int
    voices: tuple[str, ...]
    for_evaluation: bool


SUBSETS = {
    subset.name: subset
    for subset in (
        DemoSubset("train", 20_000, TRAINING_VOICES, for_evaluation=False),
        DemoSubset("calibration", 500, TRAINING_VOICES, for_evaluation=False),
        DemoSubset("dev", 200, DEVELOPMENT_VOICES, for_evaluation=True),
        DemoSubset("test", 300, TEST_VOICES, for_evaluation=True),
    )
}


def demo_root(subsets: tuple[str, ...], seed: int = 0, processes: int = 2) -> Path:
    """Make the subsets of the demo corpus that do not exist yet, and give its folder.

    Args:
        subsets: Names of :data:`SUBSETS`.
        seed: Seed of sentences, voices and noise.
        processes: Number of shards that are made at once, without influence on the bytes.

    Returns:
        A folder in LibriSpeech's layout: ``<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<nnnn>.flac``.
    """
    root = cache_folder() / f"demo-speech-v{VERSION}-seed{seed}"
    with locked(root / "lock"):  # parallel jobs wait for the first one
        for name in subsets:
            made = root / name
            if made.is_dir():
                if not (made / CHECKSUMS).is_file():
                    write_checksums(made)
                damaged = damage(made, remember=True)
                if damaged is None:
                    continue
                print_warning(f"{made / damaged} is damaged; the demo's {name} set is spoken again")
            with write_folder(made) as folder:
                _speak_subset(SUBSETS[name], folder, seed, processes)
                write_checksums(folder)
    return root


def _speak_subset(subset: DemoSubset, folder: Path, seed: int, processes: int) -> None:
    def speak(shard: int) -> None:
        command = [sys.executable, "-m", "sparsewav.data.demo", subset.name, str(folder), str(seed), str(shard)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise UserError(f"the demo's speech could not be made in {folder.parent}: {reason}; is there room?")

    shards = range(-(-subset.utterances // UTTERANCES_PER_SHARD))
    with (
        stage(Console(), f"Speaking the demo's {subset.name} set (first use only)") as progress,
        ThreadPoolExecutor(processes) as pool,
    ):
        for number, _ in enumerate(pool.map(speak, shards)):
            progress(number + 1, len(shards))


def _speak_shard(subset: DemoSubset, folder: Path, seed: int, shard: int) -> None:
    generator = np.random.default_rng([seed, zlib.crc32(subset.name.encode()), shard])
    transcripts: dict[int, list[str]] = {}
    first = shard * UTTERANCES_PER_SHARD
    for _ in range(first, min(first + UTTERANCES_PER_SHARD, subset.utterances)):
        sentence = draw_sentence(generator, for_evaluation=subset.for_evaluation)
        voice = int(generator.integers(len(subset.voices)))
        audio = _speak_utterance(sentence, subset.voices[voice], generator)
        chapter_folder = folder / str(voice + 1) / str(shard)
        chapter_folder.mkdir(parents=True, exist_ok=True)
        lines = transcripts.setdefault(voice, [])
        identifier = f"{voice + 1}-{shard}-{len(lines):04d}"
        soundfile.write(chapter_folder / f"{identifier}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
        lines.append(f"{identifier} {sentence}\n")
    for voice, lines in transcripts.items():
        path = folder / str(voice + 1) / str(shard) / f"{voice + 1}-{shard}.trans.txt"
        path.write_text("".join(lines), encoding="utf-8")


def _speak_utterance(sentence: str, variant: str, generator: np.random.Generator) -> np.ndarray:
    """Speak a sentence with random speed, pitch, vocal tract length, loudness and background noise."""
    samples = espeak.speak(
        sentence.lower(),
        f"en-us+{variant}",
        words_per_minute=int(generator.integers(130, 181)),
        pitch=int(generator.integers(25, 76)),
        pitch_range=int(generator.integers(30, 71)),
    )
    # Playing the samples faster or slower also moves the formants, which turns one voice into many speakers.
    stretch = generator.uniform(0.9, 1.12)
    samples = soxr.resample(samples, espeak.SAMPLE_RATE * stretch, SAMPLE_RATE)
    before, after = (np.zeros(int(generator.uniform(0.02, 0.15) * SAMPLE_RATE), np.float32) for _ in range(2))
    samples = np.concatenate([before, samples, after])
    samples *= 10 ** (generator.uniform(-26, -16) / 20) / np.sqrt(np.mean(samples**2))
    noise = generator.standard_normal(len(samples)).astype(np.float32)
    if generator.random() < 0.5:  # half of the utterances get brown noise instead of white noise
        noise = np.cumsum(noise - noise.mean(), dtype=np.float64).astype(np.float32)
        noise -= np.convolve(noise, np.full(801, 1 / 801, np.float32), mode="same")
    noise_level = 10 ** (-generator.uniform(20, 40) / 20) * np.sqrt(np.mean(samples**2))
    samples += noise * noise_level / np.sqrt(np.mean(noise**2))
    return np.clip(samples, -1, 1)


if __name__ == "__main__":
    _name, _folder, _seed, _shard = sys.argv[1:]
    _speak_shard(SUBSETS[_name], Path(_folder), int(_seed), int(_shard))
