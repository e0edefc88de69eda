"""The card of a run's model: what was done, what it costs in error rates, and the metadata that the hub reads.

It is made from ``metrics.json`` alone, so that it says what that says.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sparsewav.models.hub import commit_of
from sparsewav.models.load import SpeechModel
from sparsewav.pipeline.naming import last_change, rounded_to
from sparsewav.settings.baselines import OURS
from sparsewav.settings.data import Data, DemoData, LibriSpeechHub
from sparsewav.settings.run import Config
from sparsewav.settings.sparsity import COUNTED

CARD = "README.md"
TAKEN_OVER = ("license", "license_name", "license_link", "language")
"""What holds for a pruned model as for the dense one, by the names in the metadata of a card."""

RATES = {"wer": "word error rate", "cer": "character error rate"}


def provenance(config: Config, speech: SpeechModel) -> dict[str, Any]:
    """Give what a card says of the dense model and of the speech, before anything of the model changes.

    Returns:
        ``base_model`` (its name on the hub, or that of the model which it was made from itself) and ``commit``, which
        are None where they are not known; licence and language from the dense model's card; ``corpus``, ``dataset``
        (on the hub), and the subsets by their role.
    """
    assert speech.folder is not None
    stated = read_metadata(speech.folder)
    commit = commit_of(speech.folder)
    corpus, dataset, language = _corpus(config.data)
    return {
        "base_model": config.model.name_or_path if commit else stated.get("base_model"),
        "commit": commit,
        **({"language": language} if language else {}),
        **{key: stated[key] for key in TAKEN_OVER if stated.get(key)},
        "corpus": corpus,
        "dataset": dataset,
        "subsets": {role: [_shown(name) for name in config.data.names(role)] for role in config.roles},
    }


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read what the card in a model's folder says for the hub; empty where it says nothing that can be read."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except Exception:  # other people's cards are free text, and nothing but the new card depends on them
        return {}


def _corpus(data: Data) -> tuple[str, str | None, str | None]:
    """Give the name of the corpus, its name on the hub, and its language; None for what is not known."""
    if isinstance(data, LibriSpeechHub):
        return "LibriSpeech", "openslr/librispeech_asr", "en"
    if isinstance(data, DemoData):
        return "SparseWAV's demo corpus (eSpeak NG)", None, "en"
    path = str(getattr(data, "path", None) or getattr(data, "root", None) or "")
    if path and not Path(path).expanduser().exists():
        return path, path, None
    return Path(path).name or "own recordings", None, None


def _shown(name: str) -> str:
    """Give the name of a subset; of a file its last part, because a card is published and paths are private."""
    return Path(name).name if Path(name).expanduser().exists() else name


def make_card(metrics: Mapping[str, Any]) -> str:
    """Write the card of a run's model from the run's metrics."""
    origin, ours = metrics["provenance"], metrics["method"] == OURS
    sets = metrics["evaluation"]
    scored = [rate for rate in RATES if any(record.get(rate) is not None for record in sets)]
    rounded = rounded_to(metrics)
    metadata = ModelCardData(
        model_name="-".join(filter(None, (metrics["model"], f"{metrics['achieved_sparsity']:.2f}", rounded))),
        base_model=origin["base_model"],
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition" if scored else "feature-extraction",
        tags=["sparsewav", "speech", "pruning" if ours else metrics["method"], *(["quantization"] if rounded else [])],
        datasets=[origin["dataset"]] if origin["dataset"] else None,
        metrics=scored or None,
        eval_results=[_result(metrics, record, rate) for record in sets for rate in scored] or None,
        **{key: origin.get(key) for key in TAKEN_OVER},
    )
    text = _describe(metrics) + _error_rates(metrics, sets, scored) + _loading(metrics)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}")  # which reads and checks the metadata
    return str(card)


def _result(metrics: Mapping[str, Any], record: Mapping[str, Any], rate: str) -> EvalResult:
    origin, name = metrics["provenance"], _shown(record["name"])
    configuration, _, split = name.rpartition("/")
    return EvalResult(
        task_type="automatic-speech-recognition",
        task_name="Automatic Speech Recognition",
        dataset_type=origin["dataset"] or "custom",
        dataset_name=f"{origin['corpus']} {name}",
        dataset_config=configuration or None,
        dataset_split=split,
        metric_type=rate,
        metric_name=f"{name} {rate.upper()}",
        metric_value=round(100 * record[rate], 2),
    )


def _error_rates(metrics: Mapping[str, Any], sets: list[dict[str, Any]], scored: list[str]) -> str:
    """Write the table of error rates in percent, a row for every set and rate; of an encoder that of its distances."""
    if not scored:
        rows = "".join(
            f"| {_shown(record['name'])} | {record['n_utterances']:,} | {record['divergence']:.4f} |\n"
            for record in sets
            if record.get("divergence") is not None
        )
        head = "| evaluated on | utterances | distance of hidden states from the dense model's |"
        return f"\n{head}\n|---|---|---|\n{rows}"
    change = last_change(metrics)
    tuned, last = bool(change), f"pruned, {change}" if change and " and " in change else f"pruned and {change}"
    columns = ["evaluated on", "utterances", "", "dense", "pruned", *([last] if tuned else [])]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for record in sets:
        for rate in scored:
            keys = (f"{rate}_dense", f"{rate}_pruned", *([rate] if tuned else []))
            cells = [f"{100 * record[key]:.2f} %" if record.get(key) is not None else "–" for key in keys]
            lines.append(" | ".join([_shown(record["name"]), f"{record['n_utterances']:,}", rate.upper(), *cells]))
    table = "".join(f"| {line} |\n" for line in lines)
    spelled = " and ".join(f"{rate.upper()}: {RATES[rate]}" for rate in scored)
    corpus = metrics["provenance"]["corpus"]
    return f"\n{table}\n{spelled} on {corpus}, by greedy CTC decoding without a language model.\n"


def _describe(metrics: Mapping[str, Any]) -> str:
    origin, ours = metrics["provenance"], metrics["method"] == OURS
    source = f"`{origin['base_model']}`" if origin["commit"] else f"`{metrics['model']}`"
    if origin["commit"]:
        source += f" (commit `{origin['commit']}`)"
    elif origin["base_model"]:
        source += f", which was made from `{origin['base_model']}`"
    unit = "" if metrics["target_sparsity"] is None else " sparsity"
    rounded = f" and rounded to {name}" if (name := rounded_to(metrics)) else ""
    done = f"pruned to {_asked(metrics)}{unit}{rounded}" if ours else f"compressed with {metrics['method']}"
    tuned = f", with {metrics['finetune_strategy']} tuning" if metrics["updates"] else ", in one shot"
    facts = _pruning_facts(metrics) if ours else _compression_facts(metrics)
    sets = metrics["evaluation"]
    seen = [(record["name"], record["overlap"]) for record in sets if record["overlap"]]
    if seen:
        facts["evaluation utterances that the model was made from, too"] = ", ".join(
            f"{count} of {_shown(name)}" if len(sets) > 1 else str(count) for name, count in seen
        )
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return f"""# {metrics["model"]}, {done}

Made by SparseWAV from {source}{tuned}.

| | |
|---|---|
{rows}"""


def _asked(metrics: Mapping[str, Any]) -> str:
    if metrics["target_megabytes"] is not None:
        return f"at most {metrics['target_megabytes']:g} MB"
    for key, name in COUNTED.items():
        if metrics[f"target_{key}"] is not None:
            return f"{metrics[f'target_{key}']:g} of the encoder's {name}"
    if metrics.get("asked_speedup") is not None:
        return f"{metrics['asked_speedup']:g} times the speed of the dense model"
    return metrics["pattern"] or f"{metrics['target_sparsity']:g}"


def _pruning_facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    cut = metrics["achieved_share"] is not None
    removed = " removed" if cut else ""
    stages = ", then ".join(
        (_asked(metrics) if record["sparsity"] is None else f"{record['sparsity']:g}" + removed)
        + (f" and {record['updates']:,} updates" if record["updates"] else "")
        for record in metrics["stages"]
    )
    sample = ", ".join(metrics["provenance"]["subsets"]["calibration"])
    return {
        "saliency": metrics["saliency"] or "none",
        "solver": f"{metrics['solver']}, objective {metrics['objective']}, recovery {metrics['recovery']}",
        "allocation": metrics["allocation"],
        f"sparsity of the {metrics['scope']}'s matrices": (
            f"{metrics['achieved_sparsity']:.4f} (asked for: {_asked(metrics)})"
        ),
        **({"nominal bits of their weights": f"{metrics['bits']:.3g}"} if metrics["bits"] else {}),
        "pruned to": stages,
        **(_size_facts(metrics) if cut else {}),
        "parameters": f"{metrics['params_total']:,}; {metrics['params_dense']:,} before"
        if cut
        else f"{metrics['params_nonzero']:,} of {metrics['params_total']:,} are not zero",
        "weights in bitmask format": f"{metrics['bytes'] / 1e6:.2f} MB",
        "calibration": f"{metrics['n_calibration_utterances']:,} utterances of {sample}, seed {metrics['seed']}",
    }


def _size_facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Say what share of the encoder stays, or how fast the model is and how that was measured."""
    if metrics.get("asked_speedup") is None:
        return {"share of the encoder that stays": f"{metrics['achieved_share']:.4f}"}
    how = metrics["latency"]
    before, after = (sum(how[key]) for key in ("seconds_dense", "seconds"))
    return {
        "times as fast as the dense model": (
            f"{metrics['achieved_speedup']:.2f} (asked for: {metrics['asked_speedup']:g}); {after:.4f} s instead of "
            f"{before:.4f} s: {how['conditions']}, {how['processor']}"
        )
    }


def _compression_facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    done = metrics["compression"]
    sample = ", ".join(metrics["provenance"]["subsets"]["training"])
    return {
        "parameters": f"{metrics['params_total']:,}, {metrics['params_nonzero']:,} of them not zero; "
        f"{done['params_dense']:,} before",
        "compression": f"{done['updates']:,} updates of {done['batch_size']} utterances of {sample}",
        "published updates divided by": f"{done['update_divisor']:g}",
        "published learning rates times": f"{done['lr_multiplier']:g}",
        "tuning for recognition": f"{metrics['updates']:,} updates",
    } | {name.replace("_", " "): str(value) for name, value in done["facts"].items()}


def _loading(metrics: Mapping[str, Any]) -> str:
    loader = f"`{'AutoModelForCTC' if metrics.get('wer') is not None else 'AutoModel'}.from_pretrained`"
    loading = f"{loader} loads it as any other model."
    if metrics["model_type"].startswith("sparsewav"):
        loading = f"`import sparsewav.models.load` registers its class; then {loader} loads it."
    elif metrics["method"] == OURS and metrics["achieved_share"] is None:
        loading = f"{loader} loads the dense weights, with their zeros, as any other model."
    return f"\n{loading}\n"
