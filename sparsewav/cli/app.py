"""The entry points ``sparsewav`` and ``sparsewav-train``: the one place that knows Hydra."""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from sparsewav.cli.explain import check_overrides, explain, refuse_added_keys
from sparsewav.cli.result_table import show_result
from sparsewav.errors import UserError
from sparsewav.files import cannot_write, conf_folder, write_file, write_folder
from sparsewav.pipeline.naming import run_name, short_hash
from sparsewav.progress import quieten_libraries
from sparsewav.settings.data import Data, subset_faults
from sparsewav.settings.options import MISSING
from sparsewav.settings.run import SCHEMAS, Config, TrainConfig

T = TypeVar("T")

SETTINGS = ".hydra"
"""Folder of a run's composed configuration; Hydra's name for it."""


class RememberSweep(Callback):
    """Remembers the folder of this process's multirun: Hydra tells it to nobody but its callbacks."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        RememberSweep.folder = Path(str(config.hydra.sweep.dir))


def _sweep_name() -> str:
    """Give the same name for the same command line, so that a second launch of a sweep finds its runs."""
    return f"sweep-{short_hash(sorted(word for word in sys.argv[1:] if not word.startswith('-')))}"


def _register() -> None:
    store = ConfigStore.instance()
    for group, schemas in SCHEMAS.items():
        for schema in schemas:
            store.store(name=f"base_{schema.__name__}", node=schema, group=group)
    # The groups have no value yet: the defaults list chooses one of each, and a class without a base would merge.
    for name, config_type in (("schema", Config), ("train_schema", TrainConfig)):
        chosen = {item.name: MISSING for item in fields(config_type) if item.name in SCHEMAS}
        store.store(name=name, node=config_type(**chosen))
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    # Cached in the configuration, which workers get from the launching process: their own command line is another.
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True, use_cache=True)


_register()  # at import: the joblib launcher's workers import this module and nothing else


def typed(settings: DictConfig) -> Any:
    """Give the dataclass that Hydra's settings were made from, filled; its check names the values that are missing.

    Raises:
        UserError: ``+key=value`` added a key that the schema does not have; Hydra lets it through.
    """
    refuse_added_keys(settings, str(HydraConfig.get().job.config_name))
    missing, filled = OmegaConf.missing_keys(settings), settings.copy()
    for key in missing:  # at which OmegaConf would stop, and not say what else is wrong
        OmegaConf.update(filled, key, "")
    config = OmegaConf.to_object(filled)
    for group, _, name in (key.rpartition(".") for key in missing):
        setattr(attrgetter(group)(config) if group else config, name, MISSING)
    return config


def data_of_words(words: Sequence[str], model: str) -> Data:
    """Give the options of data that a command line names, upon those of the run that made a model.

    Args:
        words: Overrides of the group ``data``. Where one of them chooses the source, nothing is taken from the run.
        model: The folder of a run, or something else, to which ``demo`` has the demo's speech and others have none.

    Raises:
        UserError: A word is no option of data, or nothing says what the speech is.
    """
    check_overrides(words, "config")
    for word in words:
        if not re.match(r"data(\.\w+)?=", word):
            raise UserError(f"--data {word} is no option of data; write data=SOURCE or data.KEY=VALUE")
    settings = Path(model).expanduser() / SETTINGS
    recorded = OmegaConf.create()
    own = any(word.startswith("data=") for word in words)
    if not own and (settings / "config.yaml").is_file():
        recorded = OmegaConf.load(settings / "config.yaml").data
        words = [f"data={OmegaConf.load(settings / 'hydra.yaml').hydra.runtime.choices.data}", *words]
    elif not own and model != "demo":
        raise UserError(f"{model} is no run, whose speech could be taken; name the speech: --data data=...")
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            data = hydra.compose("config", list(words)).data
        given = {word.partition("=")[0].removeprefix("data.") for word in words}
        data = OmegaConf.merge(data, {key: value for key, value in recorded.items() if key not in given})
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, "config")) from error
    if missing := sorted(OmegaConf.missing_keys(data)):
        raise UserError("\n".join(f"{key} has no value; give it: {key}=..." for key in missing))
    result: Any = OmegaConf.to_object(data)
    if faults := [*(f"data.{fault}" for fault in result.faults()), *subset_faults(result, ["evaluation"])]:
        raise UserError("\n".join(faults))
    return result


def run_job(settings: DictConfig) -> float | None:
    """Do one job of a run or a sweep, as Hydra's task function; the tasks of one Slurm job do it together.

    Returns:
        The word error rate, or the divergence of an encoder, which sweepers take; None from a failed job of a sweep,
        which does not stop the others.

    Raises:
        SystemExit: The one job of a run failed; the code is 1.
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
        config: Config = typed(settings)
        config.check()
        quieten_libraries()
        from sparsewav.pipeline.run import run  # imported late: --help and configuration errors need no PyTorch
        from sparsewav.pipeline.tracking import RunDescription, make_tracker

        console.print(f"[bold]{folder.name}[/bold]")
        metrics = run(config, folder, console, begin=lambda: _write_settings(settings, folder))
        description = RunDescription(
            name=folder.name,
            settings=OmegaConf.to_container(settings, resolve=True),  # type: ignore[arg-type]
            choices=_choices(),
            overrides=list(HydraConfig.get().overrides.task),
            group=_group(folder, is_sweep),
        )
        make_tracker(config.tracker, description)(metrics, folder)
        if not is_sweep:
            show_result(metrics, folder, console)
        return metrics["wer"] if metrics["wer"] is not None else metrics["divergence"]
    except Exception as error:
        _record_failure(error, settings, folder, console)
        if is_sweep:
            return None
        raise SystemExit(1) from None


def _write_settings(settings: DictConfig, folder: Path) -> None:
    """Write what Hydra writes at every launch, when the work begins: a launch that does nothing changes no record."""
    texts = {"config": settings, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    with write_folder(folder / SETTINGS) as temporary:
        for name, content in texts.items():
            (temporary / f"{name}.yaml").write_text(OmegaConf.to_yaml(content), encoding="utf-8")


def _record_failure(error: Exception, settings: DictConfig, folder: Path, console: Console) -> None:
    if isinstance(error, OmegaConfBaseException):
        error = UserError(explain(error, str(HydraConfig.get().job.config_name)))
    elif not isinstance(error, FileNotFoundError) and (sentence := cannot_write(error, folder)):
        cause, error = error, UserError(sentence)
        error.__cause__ = cause
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
    # The disk that is full for the results is full for the record, too; the message is on the terminal.
    with suppress(OSError, UserError):
        with write_file(folder / "error.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
        if not any((folder / name).is_file() for name in ("metrics.json", "training.json")):  # of a finished launch
            with (folder / f"{HydraConfig.get().job.name}.log").open("a") as log:
                log.write(trace)
            if not (folder / SETTINGS).is_dir():
                _write_settings(settings, folder)
        if not expected:
            console.print(
                f"This is a fault of sparsewav; please report it with {folder / 'error.json'}", soft_wrap=True
            )


def _choices() -> dict[str, str]:
    """Give the option chosen in every group; ``None`` where there is none."""
    choices = HydraConfig.get().runtime.choices.items()
    return {str(group): str(option) for group, option in choices if not str(group).startswith("hydra/")}


def _group(folder: Path, is_sweep: bool) -> str | None:
    """Give the experiment that a run belongs to, or the folder of its sweep."""
    # A list of options (experiment=[best,ours/accuracy_one_shot]) is no choice of Hydra's; the overrides have it.
    for override in HydraConfig.get().overrides.task:
        if override.startswith("experiment="):
            return override.partition("=")[2]
    return folder.parent.name if is_sweep else None


def train_job(settings: DictConfig) -> None:
    """Do one training, as Hydra's task function of ``sparsewav-train``."""
    console = Console()
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        config: TrainConfig = typed(settings)
        quieten_libraries()
        config.check()
        from sparsewav.training.dense import train

        train(config, folder, console, begin=lambda: _write_settings(settings, folder))
    except Exception as error:
        _record_failure(error, settings, folder, console)
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
    logging.raiseExceptions = False  # a log that cannot be written, as on a full disk, is no reason for a traceback
    # With this Hydra raises its errors, instead of printing them its own way and leaving.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Python's parser stops at an option behind a key=value (seed=1 -m sparsity.target=0.5,0.7): options go first.
    sys.argv[1:] = sorted(
        sys.argv[1:], key=lambda word: not word.startswith("-") and ("=" in word or word.startswith("~"))
    )
    try:
        check_overrides(sys.argv[1:], config_name)
        hydra.main(config_path=str(conf_folder()), config_name=config_name, version_base="1.3")(task)()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python would say so at its end, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # of Hydra's own folders and files, which do not always say which they are
        path = Path(error.filename) if error.filename else RememberSweep.folder or Path("the output folder")
        raise SystemExit(f"error: {cannot_write(error, path) or explain(error, config_name)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise SystemExit(f"error: {explain(error, config_name)}") from None
