"""The sets of utterances that a configuration names: listed, filtered and drawn."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from sparsewav.data.demo import SUBSETS, demo_root
from sparsewav.data.fetched import fetched_once
from sparsewav.data.huggingface import read_dataset, stream_shuffled, with_ids
from sparsewav.data.librispeech import audio_without_transcript, read_librispeech_folder
from sparsewav.data.manifest import read_manifest
from sparsewav.data.text import Normalization, normalize
from sparsewav.data.utterances import (
    Broken,
    Listing,
    Utterance,
    audio_seconds,
    decoding_fault,
    sample_utterances,
    with_shared_audio,
)
from sparsewav.errors import UserError
from sparsewav.progress import stage
from sparsewav.settings.data import Data, DemoData, HuggingFace, LibriSpeechFolder, LibriSpeechHub, Manifest
from sparsewav.settings.options import no_value

EVALUATION_SEED = 0
"""Draws ``data.evaluation_utterances``: not the run's seed, so that runs of several seeds are measured on the same."""

FILTERS = ("text_filter", "min_seconds", "max_seconds")
"""Settings that leave utterances out."""


@dataclass
class Subset:
    """What was read of a subset, after the filters.

    Attributes:
        utterances: Those that are left, in the order of the source.
        listed: Number of utterances that the source lists; of a stream, those that were looked at.
        filtered: Number of utterances that each filter left out.
        broken: The utterances that cannot be read.
        recognised: A sentence that says how the source is read where nobody said so; or nothing.
        unused: A sentence on what there is besides and is not used; or nothing.
    """

    utterances: list[Utterance] = field(default_factory=list)
    listed: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    recognised: str = ""
    unused: str = ""

    def counts(self) -> dict[str, int]:
        """Give the number of utterances that are listed, and those that are left out, by the setting that does it."""
        broken = {"skip_broken": len(self.broken)} if self.broken else {}
        return {"listed": self.listed, **self.filtered, **broken}


class Sets:
    """The sets of utterances that a configuration names; every subset is read once, when it is first asked for.

    Samples are drawn from what the filters leave. Every method raises :class:`UserError` where a subset is missing,
    broken or too small.

    Attributes:
        data: The configuration.
        needs_text: Whether an utterance without a transcript counts as broken; for an encoder without a head it does
            not.
        unlabelled: The names of subsets in which it does not either (:meth:`leave_calibration_unlabelled`).
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.needs_text = True
        self.unlabelled: frozenset[str] = frozenset()
        self._subsets: dict[str, Subset] = {}
        self._samples: dict[tuple[int, int], Subset] = {}  # of a stream, by size and seed

    def leave_calibration_unlabelled(self, roles: Iterable[str]) -> None:
        """Let utterances of the calibration subsets have no transcripts, unless one of these roles reads them, too."""
        labelled = {name for role in roles for name in self.data.names(role)}
        self.unlabelled = frozenset(self.data.names("calibration")) - labelled

    def read(self, role: str) -> dict[str, list[Utterance]]:
        """Give every utterance of a role's subsets that the filters leave, by the subsets' names."""
        key, _ = self.data.subset(role)
        names = self.data.names(role)
        if not names:
            raise UserError(no_value(key))
        for name in names:
            if name not in self._subsets:
                self._subsets[name] = self._filtered(
                    _list(self.data, key, name, needs_text=self._reads_text(name)), f"{key}={name}", name
                )
        return {name: self._subsets[name].utterances for name in names}

    def calibration(self, count: int, seed: int, *, fewer: bool = False) -> list[Utterance]:
        """Give a random sample of the calibration subset; of a stream, its beginning after it was shuffled.

        Args:
            count: The size of the sample.
            seed: Draws it.
            fewer: Whether the whole subset will do where it has no more than ``count``.
        """
        if not _is_streamed(self.data):

            def draw() -> list[Utterance]:
                listed = self._all("calibration")
                return sample_utterances(listed, min(count, len(listed)) if fewer else count, seed)

            return self._sound(draw)
        if (count, seed) not in self._samples:
            self._samples[count, seed] = self._sample_of_stream(count, seed, fewer)
        return self._samples[count, seed].utterances

    def evaluation(self) -> dict[str, list[Utterance]]:
        """Give the evaluation subsets by their names, or ``evaluation_utterances`` of each.

        These are the same ones always, in the subset's order.
        """
        return {name: self._sound(partial(self._evaluation, name)) for name in self.read("evaluation")}

    def training(self, seed: int) -> list[Utterance]:
        """Give the training subset, or a random sample of ``training_utterances`` of it."""
        key, count = "data.training_utterances", self.data.training_utterances
        if count is None:
            return self._sound(lambda: self._all("training"))
        return self._sound(lambda: sample_utterances(self._all("training"), count, seed, key))

    def development(self) -> list[Utterance]:
        """Give the development subset."""
        return self._sound(lambda: self._all("development"))

    def _all(self, role: str) -> list[Utterance]:
        return list(chain.from_iterable(self.read(role).values()))

    def _evaluation(self, name: str) -> list[Utterance]:
        utterances, count = self._subsets[name].utterances, self.data.evaluation_utterances
        if count is None:
            return utterances
        drawn = set(sample_utterances(utterances, count, EVALUATION_SEED, key="data.evaluation_utterances"))
        return [utterance for utterance in utterances if utterance in drawn]

    def _reads_text(self, name: str) -> bool:
        # All of LibriSpeech on the hub has transcripts; read always, so that what is kept serves every run.
        return isinstance(self.data, LibriSpeechHub) or (self.needs_text and name not in self.unlabelled)

    def _filtered(self, listing: Listing, given: str, name: str) -> Subset:
        subset = Subset(broken=listing.broken, recognised=listing.recognised, unused=listing.unused)
        subset.listed = len(listing.utterances) + len(listing.broken)
        for item in listing.utterances:
            self._put(item, subset, needs_text=self._reads_text(name))
        if subset.broken and not self.data.skip_broken:
            _refuse(subset.broken)
        if not subset.utterances:
            reasons = ", ".join(f"{number:,} by {self._setting(key)}" for key, number in self._left_out(subset))
            first = f"; the first that cannot be read: {subset.broken[0].reason}" if subset.broken else ""
            raise UserError(
                f"{given}: all of {subset.listed:,} utterances are left out, {reasons}; choose other values{first}"
            )
        return subset

    def _put(self, item: Utterance, subset: Subset, *, needs_text: bool) -> None:
        """Put an utterance among those that are left, or count it with those that are left out."""
        if needs_text and not item.text:
            fault = f"{item.source} has no transcript; write it or leave the utterance out"
            subset.broken.append(Broken(item.id, item.source, fault))
            return
        data, seconds = self.data, 0.0
        if not subset.filtered:
            subset.filtered = {key: 0 for key in FILTERS if getattr(data, key) is not None}
        if data.min_seconds or data.max_seconds or data.skip_broken:
            try:
                seconds = audio_seconds(item)
            except UserError as error:
                subset.broken.append(Broken(item.id, item.source, str(error)))
                return
        removed = data.remove_characters or ""
        if item.text and not normalize(item.text, Normalization(removed=removed)):
            reason = f"{item.source}: without {removed} nothing is left of the transcript {item.text!r}"
            subset.broken.append(Broken(item.id, item.source, reason))
            return
        if data.text_filter is not None and not re.fullmatch(data.text_filter, item.text):
            subset.filtered["text_filter"] += 1
        elif data.min_seconds is not None and seconds < data.min_seconds:
            subset.filtered["min_seconds"] += 1
        elif data.max_seconds is not None and seconds > data.max_seconds:
            subset.filtered["max_seconds"] += 1
        else:
            subset.utterances.append(item)

    def _sound(self, draw: Callable[[], list[Utterance]]) -> list[Utterance]:
        """Draw until all that is drawn can be decoded, with ``skip_broken``; what cannot is taken out of its subset."""
        while True:
            drawn = draw()
            faults = {item: fault for item in drawn if (fault := decoding_fault(item))} if self.data.skip_broken else {}
            if not faults:
                return drawn
            for subset in self._subsets.values():
                subset.broken += [
                    Broken(item.id, item.source, faults[item]) for item in subset.utterances if item in faults
                ]
                subset.utterances = [item for item in subset.utterances if item not in faults]

    def _sample_of_stream(self, count: int, seed: int, fewer: bool) -> Subset:
        key, _ = self.data.subset("calibration")
        (name,) = self.data.names("calibration")
        data, split = _on_hub(self.data, key, name)
        # What never changes on the hub, and what no filter chooses from, is kept.
        if not isinstance(self.data, LibriSpeechHub) or any(getattr(self.data, item) is not None for item in FILTERS):
            return self._draw_from_stream(data, split, key, name, count, seed, fewer=fewer)
        identity = {"data": data.path, "name": data.name, "split": split, "count": count, "seed": seed}

        def stream() -> Listing:
            drawn = self._draw_from_stream(data, split, key, name, count, seed, fewer=fewer)
            return Listing(drawn.utterances, recognised=drawn.recognised)

        kept = fetched_once(identity, stream)
        return Subset(kept.utterances, listed=count, recognised=kept.recognised)

    def _draw_from_stream(
        self, data: HuggingFace, split: str, key: str, name: str, count: int, seed: int, *, fewer: bool
    ) -> Subset:
        needs_text = self._reads_text(name)
        items, recognised = stream_shuffled(data, split, f"{key}={name}", count, seed, needs_text=needs_text)
        subset = Subset(recognised=recognised)
        with stage(Console(), f"Streaming {count} utterances of {split} of {data.path}") as progress:
            for item in items:
                subset.listed += 1
                if isinstance(item, Utterance):
                    fault = decoding_fault(item) if self.data.skip_broken else ""
                    item = Broken(item.id, item.source, fault) if fault else item
                if isinstance(item, Utterance):
                    self._put(item, subset, needs_text=needs_text)
                else:
                    subset.broken.append(item)
                if subset.broken and not self.data.skip_broken:
                    _refuse(subset.broken)
                progress(len(subset.utterances), count)
                if len(subset.utterances) == count:
                    break
        if len(subset.utterances) < count and not fewer:
            sample_utterances(subset.utterances, count, seed)  # says that there are too few
        subset.utterances = with_ids(subset.utterances, split)
        return subset

    def _seen(self) -> Iterator[tuple[str, Subset]]:
        yield from self._subsets.items()
        for subset in self._samples.values():
            yield f"{self.data.names('calibration')[0]} (calibration)", subset

    def _setting(self, key: str) -> str:
        value = getattr(self.data, key)
        return f"data.{key}={str(value).lower() if isinstance(value, bool) else value}"

    def _left_out(self, subset: Subset) -> list[tuple[str, int]]:
        return [(key, number) for key, number in subset.counts().items() if number and key != "listed"]

    def recognised(self) -> list[str]:
        """Give a sentence on each subset read so far that says how it was read where nobody said so."""
        return [subset.recognised for _, subset in self._seen() if subset.recognised]

    def left_out(self) -> list[str]:
        """Give the sentences on what was left out of the subsets read so far."""
        sentences = []
        for name, subset in self._seen():
            if subset.unused:
                sentences.append(subset.unused)
            if reasons := self._left_out(subset):
                total = sum(number for _, number in reasons)
                parts = ", ".join(f"{number:,} by {self._setting(key)}" for key, number in reasons)
                first = f", e.g. {subset.broken[0].source}" if subset.broken else ""
                sentences.append(f"{total:,} of {subset.listed:,} utterances of {name} are left out: {parts}{first}")
        return sentences

    def counts(self) -> dict[str, dict[str, int]]:
        """Give the numbers of what filters and ``skip_broken`` left out of the subsets read so far."""
        return {name: counts for name, subset in self._seen() if len(counts := subset.counts()) > 1}

    def broken(self) -> list[dict[str, str]]:
        """Give subset, id, source and reason of every utterance that ``skip_broken`` left out so far."""
        return [{"subset": name, **asdict(item)} for name, subset in self._seen() for item in subset.broken]


def refuse_unreadable(utterances: Iterable[Utterance]) -> None:
    """Open the header of every utterance's audio.

    Raises:
        UserError: Some cannot be read; it names the first and counts the others.
    """
    broken = []
    for item in utterances:
        try:
            audio_seconds(item)
        except UserError as error:
            broken.append(Broken(item.id, item.source, str(error)))
    if broken:
        _refuse(broken)


def _refuse(broken: Sequence[Broken]) -> NoReturn:
    more = len(broken) - 1
    others = f" (and {more:,} other{'s' if more > 1 else ''} cannot be read)" if more else ""
    raise UserError(f"{broken[0].reason}{others}; data.skip_broken=true goes on without")


def _list(data: Data, key: str, name: str, *, needs_text: bool) -> Listing:
    """List a subset without its filters."""
    if isinstance(data, Manifest):
        return read_manifest(data, name, key, needs_text=needs_text)
    if isinstance(data, DemoData):
        if name not in SUBSETS:
            raise UserError(f"{key}={name} is not in the demo corpus; it has {', '.join(SUBSETS)}")
        return Listing(read_librispeech_folder(demo_root((name,), data.seed), name))
    if isinstance(data, LibriSpeechFolder):
        listing, root = Listing([]), Path(data.root).expanduser()
        listing.utterances = read_librispeech_folder(root, name, key, listing.broken)
        if files := audio_without_transcript(root / name, listing.utterances):
            listing.unused = f"audio without a transcript in {name} is left out: {len(files)} files, e.g. {files[0]}"
        return listing
    source, split = _on_hub(data, key, name)
    if isinstance(data, HuggingFace):
        return read_dataset(source, split, f"{key}={name}", needs_text=needs_text)

    def stream() -> Listing:
        listing = read_dataset(source, split, f"{key}={name}")
        if listing.broken:
            _refuse(listing.broken)
        return listing

    return fetched_once({"data": source.path, "name": source.name, "split": split}, stream)


def _is_streamed(data: Data) -> bool:
    return isinstance(data, LibriSpeechHub) or (isinstance(data, HuggingFace) and data.streaming)


def _on_hub(data: Data, key: str, name: str) -> tuple[HuggingFace, str]:
    """Give the data set of Hugging Face's, and the split of it, that a subset is."""
    if isinstance(data, HuggingFace):
        return data, name
    configuration, slash, split = name.partition("/")
    if not slash:
        raise UserError(f"{key}={name} of data=librispeech must be <configuration>/<split>, e.g. clean/train.100")
    source = HuggingFace(path="openslr/librispeech_asr", name=configuration, streaming=True)
    return source.changed(audio_column="audio", text_column="text"), split


def find_overlap(
    data: Data,
    measured: Sequence[Utterance],
    learned: Mapping[str, Sequence[Utterance]],
    name: str = "evaluation",
) -> tuple[int, list[str]]:
    """Count the utterances of a set that word error rates are measured on, from which the model is made, too.

    The content of the audio tells, whatever the names of utterances and subsets are.

    Args:
        data: The settings that name the subsets.
        measured: The utterances that the model is measured on.
        learned: The sets that the model is made from: ``calibration``, ``training``.
        name: Name of the first set.

    Returns:
        Their number, and a sentence for every set that has some of them.

    Raises:
        UserError: There are some, and ``data.allow_overlap`` is false.
    """
    overlap: set[Utterance] = set()
    sentences = []
    for other, utterances in learned.items():
        shared = with_shared_audio(measured, utterances)
        if not shared:
            continue
        fact = f"{len(shared)} of {len(measured)} {name} utterances are in the {other} set, e.g. {shared[0].source}"
        if not data.allow_overlap:
            key, value = data.subset(other)
            raise UserError(
                f"{fact}: their word error rate is not that of unseen speech; choose another subset than "
                f"{key}={value}, or allow it with data.allow_overlap=true"
            )
        sentences.append(f"{fact} (data.allow_overlap=true)")
        overlap |= set(shared)
    return len(overlap), sentences
