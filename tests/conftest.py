"""Tiny random CTC models of every family, noise as their input, and the command line in an empty folder."""

# ruff: noqa: E402
import os
import tempfile

from jaxtyping import install_import_hook

from tests.hub import Hub, serve

HUB = serve()
# Before anything imports the hub's client, which reads them once. No test can reach the hub itself.
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": tempfile.mkdtemp(), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": ""}

# Check the types and tensor shapes of the engine at every call, in all of its modules, which are imported after this.
# As for mypy, an int is accepted as a float (PEP 484).
install_import_hook("sparsewav.pruning", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import contextlib
import importlib
import io
import logging
import random
import shutil
import subprocess
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    LasrFeatureExtractor,
    ParakeetFeatureExtractor,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    SequenceFeatureExtractor,
)
from transformers.utils import logging as transformers_logging

from sparsewav.cli import RememberSweep
from sparsewav.pruning.families import encoder_config
from sparsewav.training.dense import character_processor

BINS = 8

FEATURES = {"num_mel_bins": BINS, "max_position_embeddings": 512}
CONFIGS: dict[str, dict[str, object]] = {
    "wav2vec2": {},
    "hubert": {},
    "wavlm": {},
    "unispeech": {},
    "unispeech-sat": {},
    "data2vec-audio": {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    "sew": {"num_feat_extract_layers": 2},
    "sew-d": {"num_feat_extract_layers": 2, "position_buckets": 8, "max_position_embeddings": 16},
    "wav2vec2-conformer": {"conv_depthwise_kernel_size": 3},
    "wav2vec2-bert": {"conv_depthwise_kernel_size": 3, "feature_projection_input_dim": BINS},
    "parakeet_ctc": {**FEATURES, "conv_kernel_size": 3, "subsampling_factor": 4, "subsampling_conv_channels": 4},
    "lasr_ctc": {**FEATURES, "conv_kernel_size": 3, "subsampling_conv_channels": 4, "num_key_value_heads": 2},
    "granite_speech5_ctc": {
        "num_mel_bins": BINS // 4,
        "max_position_embeddings": 16,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "conv_kernel_size": 3,
        "context_size": 8,
        "subsample_layers": [0],
    },
}
"""What a tiny model of each family needs besides what all take."""

VOCABULARY = 7

Batch = dict[str, Tensor]


def _tiny_model(family: str, norm: str = "layer", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    options: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_dim": (8, 8),
        "conv_kernel": (8, 4),
        "conv_stride": (4, 4),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        # The usual 0.02 leaves so narrow a model with a flat attention and nearly no signal.
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    }
    if family != "data2vec-audio":
        options |= {"feat_extract_norm": norm}
    if family in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat"):
        # As in the released models: base has a group norm and post-norm layers, large a layer norm and pre-norm ones.
        options |= {"do_stable_layer_norm": norm == "layer"}
    options |= CONFIGS[family] | overrides
    config = AutoConfig.for_model(family)
    encoder = encoder_config(config)
    own = {key: options.pop(key) for key in ("vocab_size", "pad_token_id", "attn_implementation")}
    if family == "granite_speech5_ctc":  # its encoder has a head in the middle
        options["vocab_size"] = own["vocab_size"]
    options = {key: value for key, value in options.items() if hasattr(encoder, key) or key in overrides}
    options = own | (options if encoder is config else {"encoder_config": options})
    torch.manual_seed(seed)
    model = AutoModelForCTC.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are zero and gains one at first, which would hide a lost bias
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _model_input(model: PreTrainedModel, batch: Batch) -> Batch:
    if model.main_input_name == "input_values":
        return batch
    values, mask = batch["input_values"], batch["attention_mask"]
    frames = values.shape[1] // BINS
    features = {"input_features": values[:, : frames * BINS].unflatten(1, (frames, BINS))}
    return features | {"attention_mask": mask[:, BINS - 1 :: BINS][:, :frames], "labels": batch["labels"]}


def _noise_batch(samples: list[int], *, seed: int = 0, characters: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(samples), max(samples), generator=generator)
    mask = torch.arange(max(samples)) < torch.tensor(samples)[:, None]
    labels = torch.randint(1, VOCABULARY, (len(samples), characters), generator=generator)
    for row in range(1, len(samples)):
        labels[row, characters - row % characters :] = -100  # transcripts of different lengths
    return {"input_values": values * mask, "attention_mask": mask.long(), "labels": labels}


def _utterances(batches: list[Batch]) -> list[Batch]:
    return [
        {
            "input_values": batch["input_values"][row : row + 1, :samples],
            "attention_mask": batch["attention_mask"][row : row + 1, :samples],
            "labels": batch["labels"][row : row + 1],
        }
        for batch in batches
        for row, samples in enumerate(batch["attention_mask"].sum(-1).tolist())
    ]


def _plain_ctc(logits: Tensor, labels: Tensor, blank: int = 0) -> Tensor:
    impossible = -1e30  # finite, because −∞ turns into NaN in the second derivative
    log_probabilities = logits.log_softmax(-1)
    states = torch.full((2 * len(labels) + 1,), blank)
    states[1::2] = labels
    can_skip = torch.zeros(len(states), dtype=torch.bool)
    can_skip[3::2] = labels[1:] != labels[:-1]
    alphas = torch.full((len(states),), impossible, dtype=logits.dtype)
    alphas = torch.cat([log_probabilities[0, states[:2]], alphas[2:]])
    padding = torch.full((2,), impossible, dtype=logits.dtype)
    for frame in log_probabilities[1:]:
        extended = torch.cat([padding, alphas])
        skipped = torch.where(can_skip, extended[:-2], impossible)
        alphas = torch.stack([alphas, extended[1:-1], skipped]).logsumexp(0) + frame[states]
    return -alphas[-2:].logsumexp(0)


@pytest.fixture(scope="session")
def model_input() -> Callable[[PreTrainedModel, Batch], Batch]:
    """Give a batch of noise in the form that a model takes: eight samples of it make the eight bins of a frame."""
    return _model_input


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Make a model: (family, norm="layer" or "group", seed=0, **config); 2 layers 16 wide, 16 samples a frame."""
    return _tiny_model


@pytest.fixture(scope="session")
def noise_batch() -> Callable[..., Batch]:
    """Make a padded batch: (samples of each utterance, seed=0, characters=4 of the longest transcript)."""
    return _noise_batch


@pytest.fixture(scope="session")
def utterances() -> Callable[[list[Batch]], list[Batch]]:
    """Take padded batches apart: every utterance alone and without padding."""
    return _utterances


@pytest.fixture(scope="session")
def plain_ctc() -> Callable[..., Tensor]:
    """CTC loss of one utterance in plain, twice differentiable operations: (logits (frames, vocabulary), labels)."""
    return _plain_ctc


@pytest.fixture(scope="session")
def extractors() -> dict[str, SequenceFeatureExtractor]:
    """The feature extractors of the tiny models that take features; that of Granite needs torchaudio."""
    return {
        "wav2vec2-bert": SeamlessM4TFeatureExtractor(feature_size=BINS // 2, num_mel_bins=BINS // 2, stride=2),
        "parakeet_ctc": ParakeetFeatureExtractor(feature_size=BINS),
        "lasr_ctc": LasrFeatureExtractor(feature_size=BINS),
    }


WORDS = ["SEA", "SUN", "TEA", "NET", "TEN", "RAIN", "STONE", "NOTE"]


def _write_corpus(root: Path, subset: str, count: int, *, seed: int = 0, seconds: float = 0.5) -> None:
    """Write noise as speech in LibriSpeech's layout: two speakers, utterances of several lengths."""
    generator = np.random.default_rng(seed)
    transcripts: dict[Path, list[str]] = {}
    for index in range(count):
        speaker = 100 + index % 2
        folder = root / subset / str(speaker) / "7"
        folder.mkdir(parents=True, exist_ok=True)
        identifier = f"{speaker}-7-{index:04d}"
        samples = generator.standard_normal(int(16_000 * seconds * (1 + index % 3 / 4))) * 0.1
        soundfile.write(folder / f"{identifier}.flac", samples, 16_000)
        lines = transcripts.setdefault(folder / f"{speaker}-7.trans.txt", [])
        lines.append(f"{identifier} {' '.join(generator.choice(WORDS, size=2))}\n")
    for path, lines in transcripts.items():
        path.write_text("".join(lines))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with the subsets ``train`` (12 utterances) and ``test`` (6); shared, so no test changes it."""
    root = tmp_path_factory.mktemp("corpus")
    _write_corpus(root, "train", 12)
    _write_corpus(root, "test", 6, seed=1)
    return root


@pytest.fixture
def own_corpus(corpus: Path, tmp_path: Path) -> Path:
    """The same corpus for a test that changes it."""
    return shutil.copytree(corpus, tmp_path / "corpus")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot folder as the hub has them: config, safetensors, vocabulary and preprocessor of a tiny CTC model."""
    folder = tmp_path_factory.mktemp("snapshot") / "tiny-wav2vec2"
    _tiny_model("wav2vec2", vocab_size=32, conv_dim=(16, 16), conv_kernel=(20, 8), conv_stride=(20, 8)).save_pretrained(
        folder
    )
    processor = character_processor(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that this process and the processes it starts talk to; empty, as is its cache, and without a token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield HUB
    HUB.__init__(HUB.url)  # type: ignore[misc]
    shutil.rmtree(os.environ["HF_HOME"])


Completed = subprocess.CompletedProcess[str]
Run = Callable[..., Completed]

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
"""Names the console commands and their entry points."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment of a command: a cache of its own, and a terminal wide enough for paths."""
    return os.environ | {"SPARSEWAV_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}


@pytest.fixture
def run_sparsewav(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Run a console command in an empty folder, as a user does, but in the process of the test.

    Starting Python, PyTorch and transformers takes several times as long as a run of a tiny model.
    """

    def run(*arguments: str, command: str = "sparsewav", **changes: str) -> Completed:
        return _run_here(command, arguments, tmp_path, environment | changes)

    return run


@pytest.fixture
def start_sparsewav(tmp_path: Path, environment: dict[str, str]) -> Run:
    """Run a console command in an empty folder and in a process of its own, for what is about the process."""

    def run(*arguments: str, command: str = "sparsewav", **changes: str) -> Completed:
        return subprocess.run(
            [str(Path(sys.executable).parent / command), *arguments],
            cwd=tmp_path,
            env=environment | changes,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,  # a command that hangs fails its test instead of the whole suite
        )

    return run


def _run_here(command: str, arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> Completed:
    """Call a command's entry point as its console script does; returns what a process would have returned."""
    module, _, function = tomllib.loads(PYPROJECT.read_text())["project"]["scripts"][command].partition(":")
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        _undisturbed_process(),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [command, *arguments]
        code: object = 0
        try:
            getattr(importlib.import_module(module), function)()
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
        if not isinstance(code, int):  # the interpreter prints the message that SystemExit was raised with
            print(code, file=sys.stderr)
            code = 1
    return subprocess.CompletedProcess([command, *arguments], code, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def _undisturbed_process() -> Iterator[None]:
    """Begin the block as a new process begins, and take back what it changes in the state of this one."""
    argv, environment = sys.argv, dict(os.environ)
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads = torch.get_num_threads()
    _forget_hydra()
    try:
        with _undisturbed_logging(), warnings.catch_warnings():
            # The suite's filters turn warnings into errors; a command prints them, as Python's own filters have it.
            warnings.resetwarnings()
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = _print_warning
            yield
    finally:
        _forget_hydra()
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        transformers_logging.set_verbosity(verbosity)
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _undisturbed_logging() -> Iterator[None]:
    """Begin the block without pytest's handlers; afterwards close what Hydra has set up, and take it back."""
    loggers = [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    states = [(logger, logger.handlers[:], logger.level, logger.propagate, logger.disabled) for logger in loggers]
    references = logging._handlerList[:]  # weak ones, which Hydra's set-up drops
    logging.root.handlers[:] = []
    logging.root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler in logging.root.handlers:
            handler.close()
        for logger, handlers, level, propagate, disabled in states:
            logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, disabled
            logger.setLevel(level)
        logging._handlerList[:] = references


def _forget_hydra() -> None:
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    RememberSweep.folder = None


def _print_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)


@pytest.fixture
def small(model_folder: Path, corpus: Path) -> list[str]:
    """Arguments of a run on the tiny model and corpus."""
    return [
        f"model.name_or_path={model_folder}",
        "data=librispeech_dir",
        f"data.root={corpus}",
        "data.calibration_subset=train",
        "data.evaluation_subset=test",
        "calibration.utterances=12",
        "device=cpu",
    ]
