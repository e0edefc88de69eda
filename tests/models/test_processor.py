"""Feature extractors and tokenizers of any kind: from the checkpoint to labels, hypotheses and the times of words."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    ParakeetTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
)

from sparsewav.data.batches import check_labels, collate, input_lengths
from sparsewav.data.tokens import Emission, collapse, labels_of, write_text, write_words
from sparsewav.data.utterances import Utterance
from sparsewav.errors import UserError
from sparsewav.inference.transcription import transcribe_recording
from sparsewav.models.load import load_speech_model
from sparsewav.models.processor import Parts
from sparsewav.training.dense import character_processor

SENTENCES = ["sea sun tea", "net ten rain", "stone note sun", "schöne straße"]


def _pieces(kind: str, blank: str | None = "<pad>") -> Any:
    """Train a tokenizer of pieces; the blank is its last token, as in models of NeMo."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"])
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>") if kind == "bpe" else models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>"])
        if kind == "unigram":
            trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=["<unk>", "<s>"], unk_token="<unk>")
    backend.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer = (ParakeetTokenizer if kind == "unigram" else PreTrainedTokenizerFast)(
        tokenizer_object=backend, unk_token="<unk>", **({} if kind == "bytes" else {"bos_token": "<s>"})
    )
    if blank:
        tokenizer.add_special_tokens({"pad_token": blank})
    return tokenizer


KINDS = ["characters", "bpe", "unigram", "bytes"]


@pytest.fixture
def tokenizers(tmp_path: Path) -> Callable[[str], Any]:
    def make(kind: str) -> Any:
        return character_processor(tmp_path, SENTENCES).tokenizer if kind == "characters" else _pieces(kind)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_labels_write_the_text_that_they_are_of(kind: str, tokenizers: Callable[[str], Any]) -> None:
    """With repeats and blanks of the greedy rule, and with marks of start and end that a model predicts."""
    tokenizer = tokenizers(kind)
    generator = np.random.default_rng(0)
    for text, labels in zip(SENTENCES, labels_of(SENTENCES, tokenizer), strict=True):
        frames: list[int] = []
        for label in labels:
            frames += [label] * int(generator.integers(1, 4)) + [tokenizer.pad_token_id]
        special = [token for token in (tokenizer.bos_token_id, tokenizer.unk_token_id) if token is not None]
        frames = [*special, *frames, *special]
        emissions = collapse(torch.tensor(frames), tokenizer)
        assert write_text([emission.token for emission in emissions], tokenizer) == text
        words = list(write_words(emissions, tokenizer))
        assert " ".join(word for word, _, _ in words) == text
        assert all(first < stop for _, first, stop in words)
        assert all(before[2] <= after[1] for before, after in pairwise(words))


def test_characters_are_written_as_transformers_writes_them(tokenizers: Callable[[str], Any]) -> None:
    """Texts and the frames of words, for any tokens that a model may predict but marks of start and end."""
    tokenizer = tokenizers("characters")
    generator = np.random.default_rng(1)
    letters = [tokenizer.pad_token_id, *range(4, len(tokenizer))]
    for _ in range(50):
        best = torch.tensor(generator.choice(letters, size=40)).repeat_interleave(2)
        emissions = collapse(best, tokenizer)
        expected = tokenizer.decode(best, output_word_offsets=True)
        assert write_text([emission.token for emission in emissions], tokenizer) == " ".join(expected.text.split())
        offsets = [(word["word"], word["start_offset"], word["end_offset"]) for word in expected.word_offsets]
        assert list(write_words(emissions, tokenizer)) == [offset for offset in offsets if offset[0]]


def test_the_frames_of_a_word_are_those_of_its_pieces(tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("bpe")
    (sea, sun) = labels_of(["sea", "sun"], tokenizer)
    blank = tokenizer.pad_token_id
    frames = [blank, *(token for token in sea for _ in "12"), blank, *sun, blank]
    end = 1 + 2 * len(sea)
    words = list(write_words(collapse(torch.tensor(frames), tokenizer), tokenizer))
    assert words == [("sea", 1, end), ("sun", end + 1, end + 1 + len(sun))]
    assert collapse(torch.tensor([blank, 5, 5, blank, 5]), tokenizer) == [Emission(5, 1, 3), Emission(5, 4, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_characters_that_no_piece_spells_are_named(kind: str, tokenizers: Callable[[str], Any]) -> None:
    """Bytes spell every character."""
    processor = Parts(Wav2Vec2FeatureExtractor(), tokenizers(kind))
    check_labels([Utterance(str(index), text, b"") for index, text in enumerate(SENTENCES)], processor)
    other = [Utterance("a", "sea xylon", b"")]
    if kind == "bytes":
        labels = labels_of(["sea"], processor.tokenizer)[0]
        assert write_text(labels, processor.tokenizer) == "sea"
        return
    with pytest.raises(UserError, match=r"outside the model's vocabulary: .*x.*'sea xylon'"):
        check_labels(other, processor)


@pytest.mark.parametrize("blank", ["<pad>", None])
def test_the_blank_of_pieces_is_the_last_output(
    blank: str | None, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Also where the tokenizer has no token for it, as of NeMo's models."""
    tokenizer = _pieces("bpe", blank)
    pieces = len(_pieces("bpe", None))
    tiny_model("wav2vec2", vocab_size=pieces + 1, pad_token_id=pieces).save_pretrained(tmp_path)
    Parts(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer).save_pretrained(tmp_path)
    speech = load_speech_model(str(tmp_path))
    assert speech.processor.tokenizer.pad_token_id == speech.model.config.pad_token_id == pieces
    assert not speech.warnings
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))  # an ordinary piece
    if blank:
        assert "the tokenizer's blank is" in load_speech_model(str(tmp_path)).warnings[0]
    else:
        with pytest.raises(UserError, match=f"has {pieces} tokens and the model writes {pieces + 1}"):
            load_speech_model(str(tmp_path))


FEATURES = ["wav2vec2-bert", "parakeet_ctc", "lasr_ctc"]


@pytest.mark.parametrize("family", FEATURES)
def test_features_of_another_model_are_refused(
    family: str, tiny_model: Callable[..., PreTrainedModel], extractors: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = _pieces("bpe")
    tiny_model(family, vocab_size=len(tokenizer), pad_token_id=len(tokenizer) - 1).save_pretrained(tmp_path)
    Parts(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"makes input_values, and the model takes input_features; copy"):
        load_speech_model(str(tmp_path))
    Parts(type(extractors[family])(), tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"makes \d+ numbers a frame, and the model takes 8; copy"):
        load_speech_model(str(tmp_path))


@pytest.mark.parametrize("family", FEATURES)
def test_the_length_of_features_is_that_of_the_extractor(family: str, extractors: dict[str, Any]) -> None:
    extractor = extractors[family]
    generator = np.random.default_rng(0)
    samples = [8000, 16_000, 16_001, 52_345, *generator.integers(5000, 70_000, 10).tolist()]
    lengths = [
        extractor(
            [generator.standard_normal(count).astype(np.float32)],
            sampling_rate=16_000,
            return_attention_mask=True,
            return_tensors="pt",
        )["attention_mask"].sum()
        for count in samples
    ]
    assert input_lengths(samples, extractor) == lengths


@pytest.mark.parametrize("family", ["wav2vec2", *FEATURES])
def test_pieces_from_the_checkpoint_to_the_pruned_and_tuned_model(
    family: str,
    tiny_model: Callable[..., PreTrainedModel],
    extractors: dict[str, Any],
    corpus: Path,
    run_sparsewav: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """In the command, with transcripts in capitals and pieces in small letters, sensitivities and two updates."""
    tokenizer = _pieces("bpe")
    tiny_model(family, vocab_size=len(tokenizer), pad_token_id=len(tokenizer) - 1).save_pretrained(tmp_path / "source")
    extractor = extractors.get(family, Wav2Vec2FeatureExtractor(return_attention_mask=True))
    Parts(extractor, tokenizer).save_pretrained(tmp_path / "source")
    arguments = ["model.name_or_path=source", "data=librispeech_dir", f"data.root={corpus}", "device=cpu"]
    arguments += ["data.calibration_subset=train", "data.training_subset=train", "data.evaluation_subset=test"]
    arguments += ["calibration.utterances=6", "allocation.utterances=4", "allocation.probes=2", "sparsity.target=0.6"]
    arguments += ["finetune_strategy=one_pass", "training.epochs=1", "training.batch_size=12"]
    result = run_sparsewav(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "references and hypotheses are in lower case (data.case=auto)" in result.stdout
    (run,) = (tmp_path / "outputs").glob("*/model")
    loaded = AutoModelForCTC.from_pretrained(run)
    assert type(loaded).__name__ == type(tiny_model(family)).__name__
    rows = [json.loads(line) for line in (run.parent / "predictions.jsonl").read_text().splitlines()]
    hypotheses = " ".join(row[key] for row in rows for key in ("before", "after"))
    assert hypotheses.split()
    assert not re.search(r"[<>▁|A-Z]", hypotheses), hypotheses
    speech = load_speech_model(str(run))
    assert speech.processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    if family == "wav2vec2":
        assert AutoProcessor.from_pretrained(run).tokenizer.get_vocab() == tokenizer.get_vocab()
    recording = next(corpus.rglob("test/**/*.flac"))
    transcript = transcribe_recording(speech, Utterance("a", "", recording), chunk_seconds=0.4, overlap_seconds=0.1)
    assert transcript.text == " ".join(word.text for word in transcript.words)
    assert all(0 <= word.start < word.end <= transcript.seconds + 0.1 for word in transcript.words)
    batch = collate([Utterance("a", "sea sun", recording)], speech.processor)
    assert write_text(batch["labels"][0].tolist(), tokenizer) == "sea sun"
