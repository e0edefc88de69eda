"""The entry points ``sparsewav`` and ``sparsewav-train``: the one place that knows Hydra."""

import difflib
import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsewav.errors import UserError
from sparsewav.files import conf_folder
from sparsewav.progress import quieten_libraries
from sparsewav.settings.baselines import OURS
from sparsewav.settings.run import (
    NOT_IDENTIFYING,
    PLAIN,
    SCHEMAS,
    Config,
    TrainConfig,
    key_names,
)
from sparsewav.settings.validation import validate, validate_training

T = TypeVar("T")

_config_name = "config"
"""Of the command that this process runs: ``config`` or ``train``."""


class RememberSweep(Callback):
    """Remembers the folder of this process's multirun: Hydra tells it to nobody but its callbacks."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        RememberSweep.folder = Path(str(config.hydra.sweep.dir))


def _identifying(root: DictConfig) -> dict[str, Any]:
    keys = [key for key in key_names() if key not in NOT_IDENTIFYING]
    if root.finetune_strategy.name == "none":
        keys.remove("training")
    settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(root, keys), resolve=True)
    # One of the two names the model; the other one changes nothing, and so neither the run's folder.
    del settings["model"]["name_or_path" if settings["model"]["fairseq_checkpoint"] else "fairseq_checkpoint"]
    if not settings["model"]["offload"]:
        del settings["model"]["offload"]  # runs from before there was this key keep their folders
    for group, plain in PLAIN.items():  # and so do those from before there were these groups
        if settings[group]["name"] == plain:
            del settings[group]
    if settings["saliency"].get("comparison_group") == "block":
        del settings["saliency"]["comparison_group"]  # as there
    if settings["method"]["name"] == OURS:
        del settings["method"], settings["update_divisor"], settings["lr_multiplier"]
    else:
        for key in ("saliency", "allocation", "calibration", *PLAIN):
            settings.pop(key, None)
    if settings.get("training", {}).get("max_grad_norm") == 1:
        del settings["training"]["max_grad_norm"]
    return settings


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _run_name(*, _root_: DictConfig) -> str:
    """Readable part and hash of everything that the run's results depend on."""
    settings = _identifying(_root_)
    model, sparsity = settings["model"], settings["sparsity"]
    ours = "saliency" in settings
    parts = (
        Path(model["name_or_path"]).name if "name_or_path" in model else Path(model["fairseq_checkpoint"]).stem,
        *([settings["saliency"]["name"], settings["allocation"]["name"]] if ours else [settings["method"]["name"]]),
        f"{sparsity['target']:g}" if "target" in sparsity else f"{sparsity['n']}of{sparsity['m']}",
        *(settings[group]["name"] for group in PLAIN if group in settings),
        *([] if settings["finetune_strategy"]["name"] == "none" else [settings["finetune_strategy"]["name"]]),
        _hash(settings),
    )
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(parts))


def _sweep_name() -> str:
    """The same for the same command line, so that a second launch of a sweep finds its runs."""
    return f"sweep-{_hash(sorted(word for word in sys.argv[1:] if not word.startswith('-')))}"


def _register() -> None:
    store = ConfigStore.instance()
    for path, schema in SCHEMAS.items():
        group, _, name = path.rpartition("/")
        store.store(name=name, node=schema, group=group or None)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    # Cached in the configuration, which workers get from the launching process: their own command line is another.
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True, use_cache=True)


_register()  # at import: the joblib launcher's workers import this module and nothing else


def run_job(settings: DictConfig) -> float | None:
    """One job of a run or a sweep: Hydra's task function. The tasks of one Slurm job do it together.

    Returns:
        The word error rate, for sweepers; None from a failed job of a sweep, which does not stop the others.

    Raises:
        SystemExit: with code 1 when the one job of a run failed.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or (tasks := _submitit_environment()).world_size == 1:
        return _run_job(settings)
    tasks.export(set_cuda_visible_devices=False, overwrite=True)
    return _together(lambda: _run_job(settings))


def _submitit_environment() -> Any:
    from submitit.helpers import TorchDistributedEnvironment

    return TorchDistributedEnvironment()


def _together(main: Callable[[], T]) -> T | None:
    """Do something in the first of the processes that were started together; the others work for it."""
    quieten_libraries()
    from sparsewav.pipeline.workers import lead_or_work

    return lead_or_work(main)


def _run_job(settings: DictConfig) -> float | None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    console = Console()
    try:
        config: Config = _typed(settings)
        validate(config)
        quieten_libraries()
        from sparsewav.pipeline.run import run  # imported late: --help and configuration errors need no PyTorch
        from sparsewav.pipeline.tracking import RunDescription, make_tracker

        console.print(f"[bold]{folder.name}[/bold]")
        metrics = run(config, folder, console)
        description = RunDescription(
            name=folder.name,
            settings=OmegaConf.to_container(settings, resolve=True),  # type: ignore[arg-type]
            choices=_choices(),
            overrides=list(HydraConfig.get().overrides.task),
            group=_group(folder, is_sweep),
        )
        make_tracker(config.tracker, description)(metrics, folder)
        if not is_sweep:
            _show(metrics, folder, console)
        return metrics["wer"]
    except Exception as error:
        _record_failure(error, folder, console)
        if is_sweep:
            return None
        raise SystemExit(1) from None


def _record_failure(error: Exception, folder: Path, console: Console) -> None:
    if isinstance(error, OmegaConfBaseException):
        error = UserError(explain(error))
    expected = isinstance(error, UserError)
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    record = {
        "status": "failed",
        "error": message,
        "choices": _choices(),
        "overrides": list(HydraConfig.get().overrides.task),
        "traceback": trace,
    }
    console.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
    try:
        (folder / "error.json").write_text(json.dumps(record, indent=2) + "\n")
        with (folder / f"{HydraConfig.get().job.name}.log").open("a") as log:
            log.write(trace)
        if not expected:
            console.print(
                f"This is a fault of sparsewav; please report it with {folder / 'error.json'}", soft_wrap=True
            )
    except OSError:
        pass  # the disk that is full for the results is full for the record, too; the message is on the terminal


def _choices() -> dict[str, str]:
    """The option chosen in every group; ``None`` where there is none."""
    choices = HydraConfig.get().runtime.choices.items()
    return {str(group): str(option) for group, option in choices if not str(group).startswith("hydra/")}


def _group(folder: Path, is_sweep: bool) -> str | None:
    """The experiment that a run belongs to, or the folder of its sweep."""
    # A list of options (experiment=[best,ours/accuracy_one_shot]) is no choice of Hydra's; the overrides have it.
    for override in HydraConfig.get().overrides.task:
        if override.startswith("experiment="):
            return override.partition("=")[2]
    return folder.parent.name if is_sweep else None


def _show(metrics: dict[str, Any], folder: Path, console: Console) -> None:
    """The table at the end of a run."""
    seconds = metrics["seconds"]
    removed = metrics["params_total"] - metrics["params_nonzero"]
    tuned = {}
    if metrics["updates"]:
        path = ", ".join(
            f"{stage['sparsity']:g}: {100 * stage['wer_pruned']:.2f} -> {100 * stage['wer']:.2f} %"
            for stage in metrics["stages"]
        )
        tuned["word error rate, tuned"] = f"{100 * metrics['wer']:.2f} %   after {metrics['updates']:,} updates"
        tuned["stages"] = path
    compression = metrics["compression"]
    if compression:
        made = {
            "compression": f"{compression['updates']:,} updates of {compression['batch_size']} utterances",
            "sparsity, reached": f"{metrics['achieved_sparsity']:.4f}   of the transformer's matrices",
            "parameters, before": f"{compression['params_dense']:,}",
            "parameters, after": f"{metrics['params_nonzero']:,}   ({100 * compression['share_left']:.1f} %)",
            "seconds": f"compress {seconds['compress']:.1f}",
        }
    else:
        made = {
            "sparsity, asked": f"{metrics['target_sparsity']:.4f}"
            + (f"   ({metrics['pattern']})" if metrics["pattern"] else ""),
            "sparsity, reached": f"{metrics['achieved_sparsity']:.4f}   of the transformer's matrices",
            "parameters, before": f"{metrics['params_total']:,}",
            "parameters, after": f"{metrics['params_nonzero']:,}   ({removed:,} are zero)",
            "seconds": ", ".join(
                f"{stage} {seconds[stage]:.1f}{' (cached)' if stage in metrics['cached'] else ''}"
                for stage in ("calibrate", "allocate", "solve", "recover")
                if stage in seconds
            )
            + f"; prune {seconds['prune']:.1f}",
        }
    made["seconds"] += f"; finetune {seconds['finetune']:.1f}" if metrics["updates"] else ""
    made["seconds"] += f"; evaluate {seconds['evaluate']:.1f}"
    smaller = "compressed" if compression else "pruned"
    rows = {
        "word error rate, dense": f"{100 * metrics['wer_dense']:.2f} %",
        f"word error rate, {smaller}": f"{100 * metrics['wer_pruned']:.2f} %   on {metrics['n_utterances']} utterances",
        **tuned,
        **made,
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB on {metrics['device']}",
        "outputs": str(folder),
    }
    if (folder / "model").is_dir():
        rows[f"{smaller} model"] = str(folder / "model")
    others = "".join(f", {metrics[group]}" for group, plain in PLAIN.items() if metrics[group] not in (plain, None))
    how = metrics["method"] if compression else f"{metrics['saliency']}, {metrics['allocation']}{others}"
    table = Table(title=f"{metrics['model']}: {how}", show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)


def train_job(settings: DictConfig) -> None:
    """One training: Hydra's task function of ``sparsewav-train``."""
    console = Console()
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        config: TrainConfig = _typed(settings)
        quieten_libraries()
        validate_training(config)
        from sparsewav.training.dense import train

        train(config, folder, console)
    except Exception as error:
        _record_failure(error, folder, console)
        raise SystemExit(1) from None


def main() -> None:
    """Console entry ``sparsewav``; torchrun starts it in several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        _together(_main)
    else:
        _main()


def _main() -> None:
    _launch(run_job, "config")
    if RememberSweep.folder is not None:
        from sparsewav.cli.summary import summarize

        raise SystemExit(1 if summarize(RememberSweep.folder, Console()) else 0)


def train_main() -> None:
    """Console entry ``sparsewav-train``."""
    _launch(train_job, "train")


def _launch(task: Callable[[DictConfig], Any], config_name: str) -> None:
    global _config_name
    _config_name = config_name
    # With this Hydra raises its errors, instead of printing them its own way and leaving.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=str(conf_folder()), config_name=config_name, version_base="1.3")(task)()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise SystemExit(f"error: {explain(error)}") from None


def explain(error: Exception) -> str:
    """Turn an error of Hydra or the file system into one sentence that names the key and the nearest valid choice."""
    text = "\n".join(str(item) for item in (error, error.__cause__) if item)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [name for name in error.options or [] if not name.startswith("base_")]
        return f"{group}={option} does not exist{_nearest(option, options)}; choose one of {', '.join(options)}"
    if isinstance(error, OSError):
        return f"cannot write {error.filename!s}: {error.strerror}; choose another output_root"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; give it: {error.full_key}=..."
    if match := re.search(r"Could not override '([\w./@-]+)'", text):
        return _no_such_key(match[1])
    if match := re.search(r"Error merging override (\S+)", text):
        reason = next(
            (line for line in text.splitlines() if line.startswith(("Value", "Key", "Cannot", "Invalid"))), ""
        )
        if reason.startswith("Key "):
            return _no_such_key(match[1].lstrip("+~").partition("=")[0])
        return (
            f"{match[1]} has the wrong type: {reason[:1].lower()}{reason[1:]}" if reason else f"{match[1]} is not valid"
        )
    return " ".join(str(error).split())


def _typed(settings: DictConfig) -> Any:
    """The dataclass that Hydra's settings were made from, filled."""
    _refuse_added_keys(settings)
    return OmegaConf.to_object(settings)


def _refuse_added_keys(settings: DictConfig, prefix: str = "") -> None:
    """Refuse keys that ``+key=value`` put where the schema has none; Hydra lets them through."""
    schema = OmegaConf.get_type(settings)
    known = {item.name for item in fields(schema)} if is_dataclass(schema) else set(settings)
    for key in map(str, settings):
        if key not in known:
            raise UserError(_no_such_key(f"{prefix}{key}"))
        if not OmegaConf.is_missing(settings, key) and isinstance(settings[key], DictConfig):
            _refuse_added_keys(settings[key], f"{prefix}{key}.")


def _no_such_key(key: str) -> str:
    keys = _all_keys()
    if key in keys and "." in key:
        group, _, name = key.rpartition(".")
        return f"the option chosen for {group} has no key {name}; drop it or choose another option"
    return f"there is no key {key}{_nearest(key, keys)}; sparsewav --help lists them all"


def _nearest(word: str, choices: list[str]) -> str:
    matches = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _all_keys() -> list[str]:
    """Every key and group of the command's default configuration, dotted."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        settings = compose(_config_name)

    def walk(node: Any, prefix: str) -> list[str]:
        keys = []
        for key in node:
            keys.append(f"{prefix}{key}")
            if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
                keys += walk(node[key], f"{prefix}{key}.")
        return keys

    return [*walk(settings, ""), "experiment", "scale", "recipe"]
