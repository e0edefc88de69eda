"""Sparse products: the kernel beside the dense product, the choice between the two, and what is left of the model."""

import copy
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCTC

import sparsewav
from sparsewav.data.sets import Sets
from sparsewav.files import CHECKSUMS
from sparsewav.inference import acceleration, comparison, kernel, restore
from sparsewav.inference.acceleration import two_of_four
from sparsewav.inference.comparison import Comparison
from sparsewav.inference.sparse_modules import SparseConv1d, SparseLinear
from sparsewav.inference.timing import REMEMBERED, Timing, time_linear
from sparsewav.inference.wer import error_rates, transcribe
from sparsewav.models.load import load_speech_model
from sparsewav.pruning import prunable_matrices
from sparsewav.settings.data import DemoData
from sparsewav.settings.pruning import ENCODER, TRANSFORMER


def _sparse_linear(rows: int, cols: int, share: float, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(cols, rows, bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, cols, generator=generator))
        linear.weight.mul_(torch.rand(rows, cols, generator=generator) >= share)
        if rows > 3:
            linear.weight[1] = 0.0
            linear.weight[3] = torch.randn(cols, generator=generator)
    return linear.eval()


def _prune_at_random(model: Any, share: float, scope: str = TRANSFORMER) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in prunable_matrices(model, scope):
            matrix.weight.mul_(torch.rand(matrix.weight.shape, generator=generator) >= share)


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the timings say that sparse is faster, as it is not for tiny matrices."""

    def timing(linear: nn.Linear, frames: Any, kernel: bool) -> Timing:
        return Timing(*linear.weight.shape, 0.5, (2.0,), (1.0,), 96 if kernel else None)

    def timing_of_convolution(convolution: nn.Conv1d, frames: Any) -> Timing:
        return Timing(*convolution.weight.flatten(1).shape, 0.5, (2.0,), (1.0,), 96)

    monkeypatch.setattr(acceleration, "time_linear", timing)
    monkeypatch.setattr(acceleration, "time_convolution", timing_of_convolution)
    monkeypatch.setattr(comparison, "compare", _compared_with(1.0))


def _compared_with(seconds: float) -> Callable[..., Comparison]:
    """Give what compares, and finds that the accelerated model takes these seconds where the dense one takes two."""

    def compare(dense: Any, accelerated: Any, frames: tuple[int, ...], names: tuple[str, ...]) -> Comparison:
        times = (seconds,) * len(frames)
        return Comparison(tuple(frames), (2.0,) * len(frames), times, dict.fromkeys(names, (1.5,) * len(frames)))

    return compare


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "cols", "frames", "width"),
    [(1, 1, 1, 96), (5, 7, 1, 4), (8, 16, 64, 96), (13, 200, 63, 96), (300, 97, 130, 32), (257, 192, 200, 192)],
)
@pytest.mark.usefixtures("compiled")
def test_kernel_equals_the_dense_product(rows: int, cols: int, frames: int, width: int, threads: int) -> None:
    """Shapes that are no multiple of anything, an empty row, a full row: equal to float64 up to rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for share, bias in ((0.0, True), (0.8, False), (1.0, True)):
            linear = _sparse_linear(rows, cols, share, bias=bias)
            inputs = torch.randn(2, frames, cols, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                exact = copy.deepcopy(linear).double()(inputs.double()).float()
                outputs = SparseLinear(linear, width)(inputs)
                turned = SparseLinear(linear, width)(inputs.transpose(0, 1)).transpose(0, 1)  # strided
            torch.testing.assert_close(outputs, exact, rtol=1e-5, atol=1e-4)
            assert torch.equal(outputs, turned)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(("cols", "width"), [(2**16 - 1, 192), (2**16, 192), (2**16, None), (2**16 + 1, None)])
def test_columns_beyond_what_signed_numbers_hold(cols: int, width: int | None) -> None:
    """Column numbers use all 16 bits of the kernel's layout, and more of them in PyTorch's."""
    linear = _sparse_linear(4, cols, 0.9)
    inputs = torch.randn(3, cols, generator=torch.Generator().manual_seed(1))
    sparse = SparseLinear(linear, width)
    with torch.no_grad():
        torch.testing.assert_close(sparse(inputs), linear(inputs), rtol=1e-4, atol=1e-3)
    assert torch.equal(sparse.dense_weight(), linear.weight)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_more_columns_than_the_kernel_numbers_are_refused() -> None:
    """The kernel would read a wrong column; choosing the product never asks it to."""
    linear = _sparse_linear(4, 2**16 + 1, 0.9)
    with pytest.raises(sparsewav.UserError, match=r"65536 columns, and the matrix has 65537; take width=None"):
        SparseLinear(linear, 192)
    assert time_linear(linear, [1], kernel=True).width is None


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_csr_equals_the_dense_product(bias: bool) -> None:
    """What stands in for the kernel computes the same."""
    linear = _sparse_linear(30, 50, 0.8, bias=bias)
    inputs = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(SparseLinear(linear, None)(inputs), linear(inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("compiled", "always_faster")
@pytest.mark.parametrize(
    "family",
    ["wav2vec2", "hubert", "wavlm", "wav2vec2-conformer", "sew-d", "parakeet_ctc", "lasr_ctc", "granite_speech5_ctc"],
)
def test_outputs_are_those_of_the_dense_model(
    family: str, tiny_model: Any, noise_batch: Any, model_input: Any, tmp_path: Path
) -> None:
    """Every family, padding included; a saved model is dense again, and so is a restored one, bit for bit."""
    model = tiny_model(family)
    _prune_at_random(model, 0.8, ENCODER)
    matrices = prunable_matrices(model, ENCODER)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {name: value for name, value in model_input(model, noise_batch([400, 272])).items() if name != "labels"}
    with torch.no_grad():
        before = model(**batch).logits
        report = sparsewav.accelerate(model, frames=8)
        after = model(**batch).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    fused = [matrix for matrix in report.matrices if not matrix.swapped]
    assert {matrix.name.rpartition(".")[2] for matrix in fused} == (
        {"q_proj", "k_proj", "v_proj", "out_proj"} if family == "wavlm" else set()
    )
    convolutions = sum(isinstance(matrix.module, nn.Conv1d) for matrix in matrices)
    assert convolutions == sum(isinstance(module, SparseConv1d) for module in model.modules())
    assert bool(convolutions) == (family != "granite_speech5_ctc")
    assert report.swapped == len(report.matrices) - len(fused) > 0

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(saved[matrix.name + ".weight"], dense[matrix.name + ".weight"]) for matrix in report.matrices
    )
    loaded = AutoModelForCTC.from_pretrained(tmp_path).state_dict()
    assert restore(model) == report.swapped
    for state in (loaded, model.state_dict()):
        assert state.keys() == dense.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in dense.items())


@pytest.mark.usefixtures("compiled")
def test_convolutions_are_timed_with_the_frames_they_have(
    tiny_model: Any, always_faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of a stride there are more frames; what is dense is not timed, and the report names what is swapped."""
    model = tiny_model("wav2vec2", conv_dim=(8, 8, 8, 8), conv_kernel=(10, 3, 3, 2), conv_stride=(5, 2, 2, 2))
    first, *pruned = [matrix for matrix in prunable_matrices(model, ENCODER) if isinstance(matrix.module, nn.Conv1d)]
    with torch.no_grad():
        for matrix in pruned:
            matrix.weight[:, 3:] = 0.0
    timed: list[tuple[int, ...]] = []
    timing = acceleration.time_convolution

    def counting(convolution: nn.Conv1d, frames: Any) -> Timing:
        timed.append((convolution.kernel_size[0], *frames))
        return timing(convolution, frames)

    monkeypatch.setattr(acceleration, "time_convolution", counting)
    report = sparsewav.accelerate(model, frames=8)
    assert sorted(timed) == [(2, 8), (3, 16)]
    assert [matrix.name for matrix in report.matrices if matrix.swapped] == [matrix.name for matrix in pruned]
    assert "2 of these are convolutions: wav2vec2.feature_extractor.conv_layers.2.conv (87.5% zero, 2.00 times" in str(
        report
    )
    assert isinstance(model.get_submodule(first.name), nn.Conv1d)
    assert restore(model) == 2


@pytest.mark.usefixtures("compiled", "always_faster")
def test_word_error_rate_does_not_move() -> None:
    """The demo model, half of it removed, writes the same letters before and after, on speech."""
    speech = load_speech_model("demo")
    utterances = Sets(DemoData()).calibration(8, 0)
    for matrix in prunable_matrices(speech.model):
        magnitudes = matrix.weight.detach().abs()
        matrix.weight.data[magnitudes < magnitudes.median()] = 0.0
    before = transcribe(speech.model, speech.processor, utterances)
    sparsewav.accelerate(speech.model, frames=100)
    after = transcribe(speech.model, speech.processor, utterances)
    assert after == before
    assert error_rates(utterances, after).wer < 0.5


@pytest.mark.usefixtures("compiled")
def test_dense_stays_where_it_is_faster(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that are full are not even timed, and those that sparse products do not speed up are left alone."""
    model = tiny_model("wav2vec2", hidden_size=64, intermediate_size=96)
    assert sparsewav.accelerate(model, frames=50, folder=tmp_path).swapped == 0
    (key,) = json.loads((tmp_path / REMEMBERED).read_text())
    assert key.endswith("the whole model"), "no product was timed"
    monkeypatch.setattr(comparison, "compare", _compared_with(1.0))  # noise of so small a model decides nothing
    _prune_at_random(model, 0.3, ENCODER)
    report = sparsewav.accelerate(model, frames=[50, 200], folder=tmp_path)
    for matrix in report.matrices:
        worth_it = all(dense >= 1.1 * sparse for dense, sparse in zip(matrix.dense, matrix.sparse, strict=True))
        assert matrix.swapped == worth_it == (not matrix.reason)
        assert len(matrix.dense) == 2


@pytest.mark.usefixtures("compiled", "always_faster")
def test_a_model_that_is_slower_as_a_whole_stays_dense(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are faster by themselves may be slower within the model; it is then left as it was."""
    monkeypatch.setattr(comparison, "compare", _compared_with(2.1))
    model = tiny_model("wav2vec2")
    _prune_at_random(model, 0.8)
    modules, dense = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    report = sparsewav.accelerate(model, frames=8)
    assert report.swapped == 0
    assert "12 left dense: the whole model is slower" in str(report)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("compiled")
def test_timings_are_remembered(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model is not timed twice; other frames or threads, or a broken file, are timed anew.

    So is a comparison that was asked for, and that of a model with other products.
    """
    model = tiny_model("wav2vec2")
    _prune_at_random(model, 0.8)
    model.save_pretrained(tmp_path)
    calls: list[tuple[int, ...]] = []

    def timing(linear: nn.Linear, frames: Any, kernel: bool) -> Timing:
        calls.append(tuple(linear.weight.shape))
        return Timing(*linear.weight.shape, 0.8, (2.0,) * len(frames), (1.0,) * len(frames), 96)

    monkeypatch.setattr(acceleration, "time_linear", timing)
    compared: list[tuple[str, ...]] = []

    def compare(*arguments: Any) -> Comparison:
        compared.append(arguments[-1])
        return _compared_with(1.0)(*arguments)

    monkeypatch.setattr(comparison, "compare", compare)

    def accelerated(**options: Any) -> tuple[int, int]:
        calls.clear()
        compared.clear()
        report = sparsewav.accelerate(AutoModelForCTC.from_pretrained(tmp_path), **options)
        return len(calls), report.swapped

    timed, swapped = accelerated()
    products, whole = json.loads((tmp_path / REMEMBERED).read_text()).values()
    assert timed == len(products) > 0
    assert len(whole) == len(compared) == 1
    assert swapped == 12
    assert accelerated(alternatives=["PyTorch int8"]) == (0, 12)
    assert compared == [("PyTorch int8",)]
    assert accelerated() == (0, 12)
    assert not compared
    _prune_at_random(model, 0.81)  # of the same timings
    model.save_pretrained(tmp_path)
    assert accelerated() == (0, 12)
    assert len(compared) == 1
    assert accelerated() == (0, 12)
    assert accelerated(frames=7) == (timed, 12)
    assert accelerated() == (0, 12)
    (tmp_path / REMEMBERED).write_text('{"')
    assert accelerated() == (timed, 12)
    assert accelerated() == (0, 12)


def _all_timings(**values: Any) -> Any:
    """Change values of every timing in the record of :data:`REMEMBERED`."""

    def change(record: Any) -> Any:
        return {key: {name: entry | values for name, entry in timings.items()} for key, timings in record.items()}

    return change


@pytest.mark.usefixtures("compiled", "always_faster")
@pytest.mark.parametrize(
    "damage",
    [
        lambda record: [record],
        lambda record: {key: list(timings) for key, timings in record.items()},
        lambda record: {key: dict.fromkeys(timings, 1) for key, timings in record.items()},
        lambda record: {
            key: {"8x" + name: entry for name, entry in timings.items()} for key, timings in record.items()
        },
        _all_timings(width=10**30),
        _all_timings(width=0),
        _all_timings(width=-96),
        _all_timings(width=96.0),
        _all_timings(width="96"),
        _all_timings(width=None),
        _all_timings(dense=[float("nan")]),
        _all_timings(dense=[-2.0]),
        _all_timings(sparse=["1"]),
        _all_timings(sparse=[1.0, 1.0]),
        _all_timings(sparse=None),
        _all_timings(cols="16"),
        _all_timings(rows=None),
        _all_timings(other=1),
    ],
)
def test_timings_that_cannot_be_are_measured_again(
    damage: Any, tiny_model: Any, noise_batch: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that was edited or damaged costs a new timing and a line, and never changes a product."""
    model = tiny_model("wav2vec2")
    _prune_at_random(model, 0.8, ENCODER)
    everything = len(prunable_matrices(model, ENCODER))
    values = noise_batch([400])["input_values"]
    with torch.no_grad():
        dense = model(values).logits
    sparsewav.accelerate(copy.deepcopy(model), frames=8, folder=tmp_path)
    record = json.loads((tmp_path / REMEMBERED).read_text())
    (tmp_path / REMEMBERED).write_text(json.dumps(damage(record)))
    assert sparsewav.accelerate(model, frames=8, folder=tmp_path).swapped == everything
    assert caplog.text.count("the products are timed again") == 1
    assert REMEMBERED in caplog.text
    assert json.loads((tmp_path / REMEMBERED).read_text()) == record
    with torch.no_grad():
        torch.testing.assert_close(model(values).logits, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled", "always_faster")
def test_dense_weights_are_freed(tiny_model: Any) -> None:
    """Nothing of a swapped matrix is left, even where somebody still holds its module."""
    model = tiny_model("wav2vec2")
    _prune_at_random(model, 0.9)
    held = [matrix.module for matrix in prunable_matrices(model)]
    sparsewav.accelerate(model, frames=8)
    assert not prunable_matrices(model)
    assert all(module.weight.numel() == 0 for module in held)


@pytest.mark.usefixtures("compiled", "always_faster")
def test_what_is_accelerated_in_inference_mode_serves_outside_of_it(tiny_model: Any) -> None:
    model = tiny_model("wav2vec2")
    _prune_at_random(model, 0.9)
    with torch.inference_mode():
        assert sparsewav.accelerate(model, frames=8).swapped
    assert model(torch.zeros(1, 800)).logits.isfinite().all()


@pytest.mark.usefixtures("compiled", "always_faster")
@pytest.mark.parametrize("scope", [TRANSFORMER, ENCODER])
def test_a_model_made_in_inference_mode_is_accelerated(scope: str, tiny_model: Any) -> None:
    with torch.inference_mode():
        model = tiny_model("wav2vec2", "group")
        _prune_at_random(model, 0.9, scope)
        audio = torch.randn(1, 800, generator=torch.Generator().manual_seed(0))
        dense = model(audio).logits
        assert sparsewav.accelerate(model, frames=8).swapped
        torch.testing.assert_close(model(audio).logits, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled", "always_faster")
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="what is mapped can be read on Linux alone")
def test_the_checkpoint_is_let_go_of(tiny_model: Any, tmp_path: Path) -> None:
    """No tensor keeps the mapped file, and all of it, in memory once the dense weights are gone."""
    model = tiny_model("wav2vec2")
    _prune_at_random(model, 0.9)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCTC.from_pretrained(tmp_path / "model")

    def mapped() -> bool:
        return str(tmp_path / "model") in Path("/proc/self/maps").read_text()

    assert mapped(), "transformers maps checkpoints"
    assert sparsewav.accelerate(loaded, frames=8).swapped
    assert not mapped()


@pytest.mark.usefixtures("compiled", "always_faster")
def test_refusals(tiny_model: Any, noise_batch: Any) -> None:
    """What an accelerated model cannot do it says in a sentence."""
    model = tiny_model("wav2vec2")
    _prune_at_random(model, 0.8)
    with pytest.raises(sparsewav.UserError, match=r"wrapped in DataParallel; give .* model\.module"):
        sparsewav.accelerate(nn.DataParallel(model))  # type: ignore[arg-type]
    with pytest.raises(sparsewav.UserError, match="frames=0"):
        sparsewav.accelerate(model, frames=0)
    with pytest.raises(sparsewav.UserError, match="need an NVIDIA GPU"):
        sparsewav.accelerate(model, pattern="2:4")
    with pytest.raises(sparsewav.UserError, match="float32 on the CPU"):
        sparsewav.accelerate(copy.deepcopy(model).to(torch.bfloat16))
    sparsewav.accelerate(model, frames=8)
    with pytest.raises(sparsewav.UserError, match="accelerated already"):
        sparsewav.accelerate(model)
    with pytest.raises(sparsewav.UserError, match="cannot be trained"):
        model(noise_batch([400])["input_values"]).logits.sum().backward()
    with pytest.raises(sparsewav.UserError, match="no other weights"):
        model.load_state_dict(tiny_model("wav2vec2").state_dict())
    with pytest.raises(sparsewav.UserError, match=r"bfloat16 on cpu"), torch.no_grad():
        model.to(torch.bfloat16)(noise_batch([400])["input_values"].bfloat16())


def test_two_of_four() -> None:
    """The pattern that GPUs skip is recognised."""
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 3]])
    assert two_of_four(weight)
    weight[0, 1] = 1.0
    assert not two_of_four(weight)
    assert not two_of_four(weight[:, :6])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_without_a_compiler_it_says_so(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a compiler CSR products are what is tried, and the report and the log say why."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernel.sparse_kernel.cache_clear()  # an earlier test may have built it
    model = tiny_model("wav2vec2", hidden_size=64, intermediate_size=96)
    for matrix in prunable_matrices(model, ENCODER):
        nn.init.zeros_(matrix.weight)
    report = sparsewav.accelerate(model, frames=64)
    assert report.product == "CSR"
    convolutions = [matrix for matrix in report.matrices if matrix.kernel > 1]
    assert convolutions
    assert {matrix.reason for matrix in convolutions} == {acceleration.CONVOLUTIONS_NEED_KERNEL}
    assert acceleration.CONVOLUTIONS_NEED_KERNEL in str(report)
    assert "there is no C++ compiler (no-such-compiler)" in str(report)
    assert "there is no C++ compiler (no-such-compiler)" in caplog.text


@pytest.fixture
def own_kernel(compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that holds the kernel and nothing else, before this process has it; gives the library."""
    monkeypatch.setenv("SPARSEWAV_CACHE", str(tmp_path / "cache"))
    kernel.sparse_kernel.cache_clear()
    kernel.sparse_kernel()
    kernel.sparse_kernel.cache_clear()
    (library,) = tmp_path.glob("cache/kernels/*/product.so")
    yield library
    kernel.sparse_kernel.cache_clear()


def _works() -> bool:
    """Tell whether the kernel, loaded now, multiplies rightly."""
    linear = _sparse_linear(13, 200, 0.8)
    inputs = torch.randn(9, 200, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.allclose(SparseLinear(linear, 96)(inputs), linear(inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda library: os.truncate(library, 4096),
        lambda library: library.write_bytes(b""),
        lambda library: library.write_bytes(library.read_bytes().replace(b"sparsewav_product", b"sparsewav_another")),
        lambda library: library.unlink(),
        lambda library: library.with_name(CHECKSUMS).unlink(),
    ],
    ids=["truncated", "empty", "without the function", "missing", "without its checksum"],
)
def test_a_damaged_kernel_is_compiled_again(
    damage: Callable[[Path], None], own_kernel: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is loaded is what was compiled: anything else is made again, once, with a line."""
    content = own_kernel.read_bytes()
    copy_of = own_kernel.with_name("copy")  # the old file is mapped into this process, and must not be changed
    copy_of.write_bytes(content)
    copy_of.replace(own_kernel)
    damage(own_kernel)
    assert _works()
    assert caplog.text.count("it is made again") == len(caplog.records) == 1
    assert own_kernel.read_bytes() == content


@pytest.mark.parametrize("parents", range(3), ids=["library", "its folder", "kernels"])
@pytest.mark.parametrize("fault", ["may write", "belongs to another user"])
def test_a_kernel_that_others_could_have_written_is_not_loaded(
    fault: str, parents: int, own_kernel: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library in the cache that another user owns, or may write to, is code of that user."""
    foreign = [own_kernel, *own_kernel.parents][parents]
    if fault == "may write":
        foreign.chmod(foreign.stat().st_mode | 0o020)
    else:
        stat = Path.stat

        def of_another(path: Path, **options: Any) -> os.stat_result:
            status = stat(path, **options)
            return os.stat_result([*status[:4], os.getuid() + 1, *status[5:]]) if path == foreign else status

        monkeypatch.setattr(Path, "stat", of_another)
    opened: list[str] = []
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: opened.append(name) or load(name))
    assert _works()
    assert not any(name.startswith(str(own_kernel.parents[2])) for name in opened)
    assert len(opened) == len(caplog.records) == 1
    assert fault in caplog.text
    assert str(foreign) in caplog.text
    assert not Path(opened[0]).exists(), "nothing is left of what served this process"


def test_without_a_cache_the_kernel_serves_one_process(
    own_kernel: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that cannot be written, here because its place is a file, costs a line and the time to compile."""
    monkeypatch.setenv("SPARSEWAV_CACHE", str(own_kernel))
    assert _works()
    assert "compiled for this process alone" in caplog.text
    assert len(caplog.records) == 1


BUILD = "from sparsewav.inference.kernel import sparse_kernel; sparse_kernel()"


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_processes_build_it_once(environment: dict[str, str]) -> None:
    """Two processes that need the kernel at once both get it, and one folder is left of it."""
    changes = environment | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen([sys.executable, "-c", BUILD], env=changes) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    built = list(Path(environment["SPARSEWAV_CACHE"]).glob("kernels/*/product.so"))
    assert len(built) == 1
