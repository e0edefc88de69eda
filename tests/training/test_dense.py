"""Training a dense model from the terminal."""

import json
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCTC,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SequenceFeatureExtractor,
    Wav2Vec2FeatureExtractor,
)

import sparsewav.cli.app  # noqa: F401  (registers the schemas)
from sparsewav.data.tokens import labels_of, write_text
from sparsewav.files import conf_folder
from sparsewav.models.load import load_speech_model
from sparsewav.settings.run import TrainConfig
from sparsewav.training.dense import LETTERS
from tests.terminal import Run

ARCHITECTURE = (
    "architecture.hidden_size=16",
    "architecture.num_hidden_layers=2",
    "architecture.num_attention_heads=2",
    "architecture.intermediate_size=24",
    "architecture.conv_dim=[8,8,8,8,8]",
    "architecture.num_conv_pos_embeddings=4",
    "architecture.num_conv_pos_embedding_groups=2",
)


PARTS = ("training", "development", "evaluation")


@pytest.fixture
def arguments(corpus: Path) -> list[str]:
    """Arguments of a training of 60 updates on the tiny corpus."""
    data = ["data=librispeech_dir", f"data.root={corpus}", "data.training_subset=train"]
    subsets = ["data.development_subset=test", "data.evaluation_subset=test", "data.calibration_subset=train"]
    training = ["training.epochs=20", "training.batch_size=4", "training.warmup_steps=2"]
    training += ["training.precision=float32", "training.checkpoint_updates=3"]
    return [*data, *subsets, *training, *ARCHITECTURE, "device=cpu"]


@pytest.mark.parametrize("measured", ["development", "evaluation"])
def test_measuring_on_the_training_set_is_refused_or_recorded(
    run_sparsewav: Run, arguments: list[str], measured: str, tmp_path: Path
) -> None:
    arguments = [*arguments, f"data.{measured}_subset=train", "training.epochs=1", "output=model"]
    result = run_sparsewav(*arguments, command="sparsewav-train")
    assert result.returncode == 1
    assert f"error: 12 of 12 {measured} utterances are in the training set, e.g. " in result.stdout
    result = run_sparsewav(*arguments, "data.allow_overlap=true", command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "model/training.json").read_text())
    assert record["training_overlap"] == {"development": 0, "evaluation": 0} | {measured: 12}
    assert sum("are in the training set" in warning for warning in record["warnings"]) == 1


def test_an_utterance_without_enough_frames_is_refused_by_name(
    run_sparsewav: Run, arguments: list[str], own_corpus: Path
) -> None:
    audio = next((own_corpus / "train").rglob("*.flac"))
    soundfile.write(audio, np.zeros(1600), 16_000)
    result = run_sparsewav(*arguments, f"data.root={own_corpus}", "output=model", command="sparsewav-train")
    assert result.returncode == 1
    assert f"utterance {audio.stem} ({audio}) is too short: its audio has 2 frames, and its tran" in result.stdout


def test_training_leaves_a_model_that_can_be_pruned(
    run_sparsewav: Run, arguments: list[str], corpus: Path, tmp_path: Path
) -> None:
    result = run_sparsewav(*arguments, "output=model", command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "model"
    log = pandas.read_csv(folder / "training_log.csv")
    assert log["eval_wer"].notna().sum() == log["eval_cer"].notna().sum() == 20
    assert log.loc[log["eval_wer"].notna(), "epoch"].tolist() == list(range(1, 21))
    assert log["loss"].notna().sum() == 10  # of 60 updates every sixth, those with a WER among them
    record = json.loads((folder / "training.json").read_text())
    assert record["settings"]["epochs"] == 20
    assert record["n_utterances"] == {"training": 12, "development": 6, "evaluation": 6}
    assert not (folder / "checkpoints").exists()
    assert all(tensor.dtype == torch.float16 for tensor in load_file(folder / "model.safetensors").values())
    assert load_speech_model(str(folder)).model.dtype == torch.float32

    # Launched again it changes nothing; with other settings it is refused, finished or killed.
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(path.parent.name == ".hydra" for path in content)
    same = [*arguments, "output=model", "training.checkpoint_updates=7"]
    assert "Done already" in run_sparsewav(*same, command="sparsewav-train").stdout
    killed = tmp_path / "killed" / "checkpoints"
    killed.mkdir(parents=True)
    (killed / "inputs.json").write_text(json.dumps(record["inputs"]))
    for output in ("model", "killed"):
        other = run_sparsewav(*arguments, f"output={output}", "training.epochs=3", command="sparsewav-train")
        assert other.returncode == 1
        said = (
            rf"{output} was made with other settings \(training\.epochs was 20\.0 and is 3\.0\); choose another output="
        )
        assert re.search(said, other.stdout), other.stdout + other.stderr
    changed = shutil.copytree(corpus, tmp_path / "changed")
    next((changed / "train").rglob("*.flac")).write_bytes(next((changed / "test").rglob("*.flac")).read_bytes())
    shutil.move(corpus, tmp_path / "aside")
    shutil.move(changed, corpus)
    try:
        other = run_sparsewav(*arguments, "output=model", command="sparsewav-train")
    finally:
        shutil.rmtree(corpus)
        shutil.move(tmp_path / "aside", corpus)
    assert re.search(r"the training set changed since .*model was trained; choose another output=", other.stdout)
    assert all(path.read_bytes() == content[path] for path in content)
    assert set(content) | {folder / "error.json"} == {path for path in folder.rglob("*") if path.is_file()}

    data = ["data=librispeech_dir", f"data.root={corpus}"]
    subsets = ["data.development_subset=test", "data.evaluation_subset=test", "data.calibration_subset=train"]
    pruned = run_sparsewav(*data, *subsets, "model.name_or_path=./model", "calibration.utterances=12", "device=cpu")
    assert pruned.returncode == 0, pruned.stdout + pruned.stderr

    (folder / "model.safetensors").unlink()
    gone = run_sparsewav(*same, command="sparsewav-train")
    assert gone.returncode == 1
    assert "model has training.json and no weights any more; delete it to train again" in gone.stdout


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_bytes(
    run_sparsewav: Run, arguments: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    """Killed after its first checkpoint, without a chance to clean up, and with half a checkpoint left behind."""
    whole = run_sparsewav(*arguments, "output=model", command="sparsewav-train")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    command = [str(Path(sys.executable).parent / "sparsewav-train"), *arguments, "output=killed"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    (checkpoints / "checkpoint-999").mkdir()
    resumed = run_sparsewav(*arguments, "output=killed", command="sparsewav-train")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    weights = [tmp_path / name / "model.safetensors" for name in ("model", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    logs = [tmp_path / name / "training_log.csv" for name in ("model", "killed")]
    assert logs[0].read_bytes() == logs[1].read_bytes()


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (conf_folder() / "recipe").glob("*.yaml")))
def test_every_recipe_of_the_demo_makes_a_model_that_its_successor_can_start_from(recipe: str) -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = OmegaConf.to_object(compose("train", [f"recipe={recipe}"]))
    assert isinstance(config, TrainConfig)
    config.check()
    assert config.training.freeze_feature_encoder
    assert config.initial_model is not None
    assert config.initial_model == "demo" or (conf_folder() / "recipe" / f"{config.initial_model}.yaml").is_file()
    assert (conf_folder() / "model" / f"{recipe}.yaml").is_file()


def test_a_checkpoint_gives_what_fits_and_its_frozen_front_end_stays(
    run_sparsewav: Run, corpus: Path, model_folder: Path, tmp_path: Path
) -> None:
    data = ["data=librispeech_dir", f"data.root={corpus}", "data.training_subset=train", "data.training_utterances=8"]
    subsets = ["data.development_subset=test", "data.evaluation_subset=test"]
    training = ["training.epochs=1", "training.batch_size=4", "training.freeze_feature_encoder=true"]
    half = tmp_path / "half"  # as the shipped demo model is; training computes in single precision all the same
    shutil.copytree(model_folder, half)
    AutoModelForCTC.from_pretrained(model_folder, dtype=torch.float16).save_pretrained(half)
    checkpoint = [f"initial_model={half}", "architecture=same", "output=tuned", "device=cpu"]
    result = run_sparsewav(*data, *subsets, *training, *checkpoint, command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert (record["updates"], record["n_utterances"]["training"]) == (2, 8)
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "tuned"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".feature_extractor." in name:
            assert torch.equal(after[name], tensor.half()), name
        else:  # two updates away from the checkpoint, not from somewhere else
            assert float((after[name].float() - tensor).abs().max()) < 0.1, name


def test_a_training_that_leaves_the_finite_numbers_saves_no_model(
    run_sparsewav: Run, arguments: list[str], tmp_path: Path
) -> None:
    """A step of Adam is as long as the learning rate: after the first one the loss is NaN for every utterance."""
    changes = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.max_grad_norm=0", "output=model")
    result = run_sparsewav(*arguments, *changes, command="sparsewav-train")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    (error,) = (line for line in result.stdout.splitlines() if line.startswith("error: "))
    assert re.match(r"error: the training stopped at update \d of 60: .* lower training\.learning_rate", error)
    assert not list((tmp_path / "model").glob("*.safetensors"))
    assert not (tmp_path / "model" / "training.json").exists()


def test_a_training_replaces_no_model_that_is_not_its_own(
    run_sparsewav: Run, arguments: list[str], tmp_path: Path, model_folder: Path
) -> None:
    """Nor checkpoints of another program, and not the initial model itself."""
    own = shutil.copytree(model_folder, tmp_path / "own")
    (tmp_path / "mine" / "checkpoints" / "best").mkdir(parents=True)
    for output, named in ((own, "config.json"), (tmp_path / "mine", "checkpoints/best")):
        for _ in range(2):  # the record of a failure makes it no folder of a training
            words = [*arguments, f"initial_model={own}", f"output={output}"]
            result = run_sparsewav(*words, command="sparsewav-train")
            assert result.returncode == 1
            assert f"error: {output}/{named} was not written by a training and would be replaced" in result.stdout
    assert (own / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    assert (tmp_path / "mine" / "checkpoints" / "best").is_dir()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("training.scheduler=cosin", r"^error: training\.scheduler=cosin does not exist; choose one of linear, cosine"),
        ("architecture.conv_dim=[8,8]", r"^error: the architecture makes no model: .*conv_dim"),
        ("initial_model=./nowhere", r"^error: initial_model=\./nowhere is not a folder"),
        ("training.precision=int8", r"^error: training\.precision=int8 does not exist; choose one of auto"),
        ("training.precision=float16", r"^error: training\.precision=float16 wants a GPU; choose training"),
        (
            "training.gradient_accumulation_steps=3",
            r"^error: training\.batch_size=16 cannot be split into 3 equal parts",
        ),
        ("data.training_utterances=999", r"^error: data\.training_utterances=999 asks for more than the 12"),
        ("+foo=1", r"^error: there is no key foo"),
        ("device=gpu", r"^error: device=gpu is not known; choose auto, cpu"),
        ("architecture.model_type=speecht5", r"^error: .*'speecht5', which is not supported"),
    ],
)
def test_mistakes_get_one_sentence(run_sparsewav: Run, corpus: Path, argument: str, message: str) -> None:
    data = ["data=librispeech_dir", f"data.root={corpus}", "data.training_subset=train"]
    subsets = ["data.development_subset=test", "data.evaluation_subset=test"]
    device = [] if argument.startswith("device") else ["device=cpu"]
    result = run_sparsewav(*data, *subsets, *device, argument, command="sparsewav-train")
    assert result.returncode == 1
    assert re.search(message, result.stdout, re.MULTILINE), result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def _write_transcripts(corpus: Path, sentences: list[str]) -> None:
    """Give every utterance of a corpus one of these sentences."""
    for path in corpus.rglob("*.trans.txt"):
        names = [line.split()[0] for line in path.read_text().splitlines()]
        path.write_text("".join(f"{name} {sentences[int(name[-4:]) % len(sentences)]}\n" for name in names))


RUSSIAN = ["ёж ест", "мой дом", "Это я"]
GERMAN = ["straße über öl", "schön süß", "Äpfel"]


@pytest.mark.parametrize(
    ("sentences", "letters"),
    [
        (RUSSIAN, "Эдежймостяё"),
        (GERMAN, "abcefhlnprstÄßöü"),
        ([unicodedata.normalize("NFD", sentence) for sentence in GERMAN], "abcefhlnprstÄßöü"),
        (["cœur \u1ecd\u0300r\u1eb9\u0301"], "cruœ\u0300\u0301\u1eb9\u1ecd"),
        (["SEA TEA"], LETTERS),
    ],
    ids=["Cyrillic", "umlauts", "decomposed", "accents without a letter of their own", "English"],
)
def test_the_vocabulary_is_that_of_the_transcripts(
    sentences: list[str], letters: str, run_sparsewav: Run, arguments: list[str], own_corpus: Path, tmp_path: Path
) -> None:
    """Letters with accents are one token where Unicode has such a letter, however the transcripts are encoded."""
    _write_transcripts(own_corpus, sentences)
    arguments = [*arguments, f"data.root={own_corpus}", "training.epochs=1", "output=model"]
    # A sample of the training set need not have all letters.
    result = run_sparsewav(*arguments, "data.training_utterances=4", command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    vocabulary = json.loads((tmp_path / "model/vocab.json").read_text())
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    assert vocabulary == {token: index for index, token in enumerate(tokens)}
    saved = load_speech_model(str(tmp_path / "model"))
    assert saved.model.config.vocab_size == len(vocabulary)
    for sentence in sentences:
        labels = labels_of([unicodedata.normalize("NFC", sentence)], saved.processor.tokenizer)[0]
        assert write_text(labels, saved.processor.tokenizer) == unicodedata.normalize("NFC", sentence)


def test_a_training_keeps_the_tokenizer_of_its_initial_model(
    run_sparsewav: Run, arguments: list[str], own_corpus: Path, tmp_path: Path
) -> None:
    """With pieces of words; and the characters of other transcripts where it is asked for them."""
    backend = Tokenizer(BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(GERMAN * 3, BpeTrainer(vocab_size=50, special_tokens=["<unk>"]))
    pieces = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    _write_transcripts(own_corpus, GERMAN)
    first = [*arguments, f"data.root={own_corpus}", "training.epochs=1", "training.learning_rate=1e-9"]
    assert run_sparsewav(*first, "output=first", command="sparsewav-train").returncode == 0
    model = AutoModelForCTC.from_pretrained(
        tmp_path / "first", vocab_size=len(pieces), pad_token_id=pieces.pad_token_id, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "pieces")
    (tmp_path / "pieces" / "preprocessor_config.json").write_text(
        json.dumps(Wav2Vec2FeatureExtractor(do_normalize=False).to_dict())
    )
    pieces.save_pretrained(tmp_path / "pieces")
    again = [word for word in first if not word.startswith("architecture")]
    again += ["initial_model=pieces", "architecture=same"]
    result = run_sparsewav(*again, "output=kept", command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    kept = load_speech_model(str(tmp_path / "kept"))
    assert kept.processor.tokenizer.get_vocab() == pieces.get_vocab()
    assert kept.processor.feature_extractor.do_normalize is False
    head = load_file(tmp_path / "pieces/model.safetensors")["lm_head.weight"]
    assert torch.allclose(kept.model.lm_head.weight, head.float(), atol=1e-3)
    _write_transcripts(own_corpus, RUSSIAN)
    result = run_sparsewav(*again, "output=other", command="sparsewav-train")
    assert result.returncode == 1
    assert "characters outside the model's vocabulary" in result.stdout
    result = run_sparsewav(*again, "vocabulary=transcripts", "output=other", command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ё" in load_speech_model(str(tmp_path / "other")).processor.tokenizer.get_vocab()
    # An encoder has no vocabulary to keep, whatever files lie beside it.
    model.wav2vec2.save_pretrained(tmp_path / "pieces")
    result = run_sparsewav(*again, "output=encoder", command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    trained = load_speech_model(str(tmp_path / "encoder"))
    assert "ё" in trained.processor.tokenizer.get_vocab()
    assert trained.processor.feature_extractor.do_normalize is False
    assert "2 of " in result.stdout
    assert "tensors begin with random numbers" in result.stdout


def test_a_head_for_other_letters_is_not_taken_over(
    run_sparsewav: Run, arguments: list[str], own_corpus: Path, tmp_path: Path
) -> None:
    """Where the new vocabulary is as large as the old one."""
    _write_transcripts(own_corpus, ["abcde fgh"])
    first = [*arguments, f"data.root={own_corpus}", "training.epochs=1", "training.learning_rate=1e-9"]
    assert run_sparsewav(*first, "output=first", command="sparsewav-train").returncode == 0
    _write_transcripts(own_corpus, ["ijklm nop"])
    words = ["initial_model=first", "vocabulary=transcripts", "output=second", "training.seed=1"]
    result = run_sparsewav(*first, *words, command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(
        r"! 2 of \d+ tensors begin with random .* vocabulary: lm_head\.weight, lm_head\.bias", result.stdout
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert before["lm_head.weight"].shape == after["lm_head.weight"].shape
    assert not torch.allclose(before["lm_head.weight"], after["lm_head.weight"], atol=1e-3)


def test_an_encoder_whose_settings_are_a_part_of_its_models_gets_a_head(
    run_sparsewav: Run,
    corpus: Path,
    tiny_model: Callable[..., PreTrainedModel],
    extractors: dict[str, SequenceFeatureExtractor],
    tmp_path: Path,
) -> None:
    encoder: PreTrainedModel = tiny_model("parakeet_ctc").encoder
    encoder.save_pretrained(tmp_path / "encoder")
    extractors["parakeet_ctc"].save_pretrained(tmp_path / "encoder")
    subsets = [f"data.{part}_subset={'train' if part == 'training' else 'test'}" for part in PARTS]
    words = ["initial_model=encoder", "architecture=same", "training.epochs=1", "training.batch_size=6", "output=new"]
    words += ["data=librispeech_dir", f"data.root={corpus}", *subsets, "training.learning_rate=1e-9", "device=cpu"]
    result = run_sparsewav(*words, command="sparsewav-train")
    assert result.returncode == 0, result.stdout + result.stderr
    model = load_speech_model(str(tmp_path / "new")).model
    assert type(model).__name__ == "ParakeetForCTC"
    for name, tensor in encoder.named_parameters():
        assert torch.allclose(model.get_parameter(f"encoder.{name}"), tensor, atol=1e-2), name
