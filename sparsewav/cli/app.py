"""The entry points ``sparsewav`` and ``sparsewav-train``: the one place that knows Hydra."""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from io import StringIO
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hydra
import yaml
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import run_job as run_hydra_job
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from sparsewav import __version__
from sparsewav.cli.command import end_without_reader
from sparsewav.cli.explain import (
    COMMANDS,
    check_overrides,
    choices_of_keys,
    explain,
    refuse_added_keys,
    with_swept_groups,
)
from sparsewav.cli.result_table import show_result
from sparsewav.errors import UserError
from sparsewav.files import Held, cannot_write, conf_folder, write_file, write_folder
from sparsewav.pipeline.naming import SETTINGS, changes_results, run_name, short_hash
from sparsewav.progress import quieten_libraries
from sparsewav.settings.data import Data, subset_faults
from sparsewav.settings.options import MISSING, no_value
from sparsewav.settings.run import SCHEMAS, Config, TrainConfig

T = TypeVar("T")

logger = logging.getLogger(__name__)


JOBS = "SPARSEWAV_JOBS"
"""The environment variable that tells a sweep's jobs, in whatever process a launcher starts them, how many they are."""


class RememberSweep(Callback):
    """Remembers folder and jobs of this process's multirun, which Hydra tells to nobody but its callbacks.

    Attributes:
        folder: The folder of this process's multirun.
        job: The whole configuration of the job that is being done; None when it is done for the second time.
        held: Those of the jobs that another launcher of the same sweep was doing when their turn came.
    """

    folder: Path | None = None
    job: DictConfig | None = None
    held: ClassVar[list[DictConfig]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        RememberSweep.folder = Path(str(config.hydra.sweep.dir))
        params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        words = [*params, *config.hydra.overrides.task]  # the command line's come after the experiment's
        overrides = {item.key_or_group: item for item in OverridesParser.create().parse_overrides(words)}
        sweeps = [item for item in overrides.values() if item.is_sweep_override()]
        os.environ[JOBS] = str(prod(sum(1 for _ in item.sweep_string_iterator()) for item in sweeps))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        RememberSweep.job = config


def _sweep_name() -> str:
    """Give the same name for the same runs: a second launch of a sweep finds them, also with another tracker."""
    words = [word for word in sys.argv[1:] if not word.startswith("-") and changes_results(word)]
    return f"sweep-{short_hash(sorted(words))}"


def _complete(start: Callable[[], Any]) -> None:
    """Print Hydra's completions without the schemas that it takes for options."""
    with redirect_stdout(StringIO()) as said:
        start()
    print(re.sub(r"\S+=base_\w+\s?", "", said.getvalue()), end="")


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
        group, _, name = key.rpartition(".")
        parent: Any = OmegaConf.select(filled, group) if group else filled
        kind = parent._get_node(name)._metadata.ref_type
        OmegaConf.update(filled, key, kind() if kind in (int, float) else "")
    config = OmegaConf.to_object(filled)
    for group, _, name in (key.rpartition(".") for key in missing):
        setattr(attrgetter(group)(config) if group else config, name, MISSING)
    return config


def recorded_settings(run: str, file: str = "config") -> dict[str, Any] | None:
    """Read the configuration of a run or a training from its folder; None for anything else.

    Args:
        run: The folder.
        file: ``config`` for its own options, ``hydra`` for those of Hydra.

    Raises:
        UserError: The file is broken.
    """
    path = Path(run).expanduser() / SETTINGS / f"{file}.yaml"
    if file == "config" and not path.is_file():
        return None
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(found[{"config": "data", "hydra": "hydra"}[file]], dict):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"{path} is missing or broken; delete {path.parent}, and name the speech with --data"
        ) from error
    return found


def data_of_words(words: Sequence[str], model: str) -> Data:
    """Give the options of data that a command line names, upon those of the run that made a model.

    Args:
        words: Overrides of the group ``data``. Where one of them chooses the source, nothing is taken from the run.
        model: The folder of a run, or something else, of which the demo's models have the demo's speech.

    Raises:
        UserError: A word is no option of data, or nothing says what the speech is.
    """
    check_overrides(words, "config")
    for word in words:
        if not re.match(r"data(\.\w+)?=", word):
            raise UserError(f"--data {word} is no option of data; write data=SOURCE or data.KEY=VALUE")
    recorded: dict[str, Any] = {}
    own = any(word.startswith("data=") for word in words)
    if not own and (settings := recorded_settings(model)):
        recorded = settings["data"]
        choices: Any = recorded_settings(model, "hydra")
        words = [f"data={choices['hydra']['runtime']['choices']['data']}", *words]
    elif not own and (Path(model).exists() or not re.fullmatch("demo(-.+)?", model)):
        raise UserError(f"{model} is no run, whose speech could be taken; name the speech: --data data=...")
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            data = hydra.compose("config", list(words)).data
        given = {word.partition("=")[0].removeprefix("data.") for word in words}
        data = OmegaConf.merge(data, {key: value for key, value in recorded.items() if key not in given})
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, "config")) from error
    if missing := sorted(OmegaConf.missing_keys(data)):
        raise UserError("\n".join(map(no_value, missing)))
    result: Any = OmegaConf.to_object(data)
    if faults := [*(f"data.{fault}" for fault in result.faults()), *subset_faults(result, ["evaluation"])]:
        raise UserError("\n".join(faults))
    return result


def run_job(settings: DictConfig) -> float | None:
    """Do one job of a run or a sweep, as Hydra's task function; the tasks of one Slurm job do it together.

    Returns:
        The word error rate, or the divergence of an encoder, which sweepers take; None from a job of a sweep that
        failed, which does not stop the others, or that another process is on, to which :func:`_launch` comes back.

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
    job = ""
    if is_sweep:
        job = f"job {HydraConfig.get().job.num + 1}" + (f" of {os.environ[JOBS]}: " if JOBS in os.environ else ": ")
    console.print(f"[bold]{job}{folder.name}[/bold]", soft_wrap=True)

    try:
        config: Config = typed(settings)
        if config.tracker.name == "none":  # else the tracker hears of what is wrong, too
            config.check()
        quieten_libraries()
        from sparsewav.pipeline.run import run  # imported late: --help and configuration errors need no PyTorch
        from sparsewav.pipeline.tracking import RunDescription, Tracking

        description = RunDescription(
            name=folder.name,
            settings=OmegaConf.to_container(settings, resolve=True),  # type: ignore[arg-type]
            choices=_choices(),
            overrides=list(HydraConfig.get().overrides.task),
            group=_group(folder, is_sweep),
        )
        # Hydra's own launcher does the jobs one after the other, here, and can do another one meanwhile.
        alone = HydraConfig.get().launcher._target_.endswith(".BasicLauncher")
        again = RememberSweep.job if is_sweep and alone else None
        with Tracking(config.tracker, description, folder) as tracking:

            def begin() -> None:
                _write_settings(settings, folder)
                logger.info(f"{job}{folder.name}")

            config.check()
            metrics = run(config, folder, console, starts=tracking.start, begin=begin, wait=again is None)
            tracking.finish(metrics)
        if not is_sweep:
            show_result(metrics, folder, console)
        return metrics["wer"] if metrics["wer"] is not None else metrics["divergence"]
    except Held:
        assert again is not None
        RememberSweep.held.append(again)
        console.print("Another process is on this run; going on with the next, and coming back to it")
        return None
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
    start = hydra.main(config_path=str(conf_folder()), config_name=config_name, version_base="1.3")(task)
    if "--version" in sys.argv[1:]:
        print(f"{COMMANDS[config_name][0]} {__version__}")
        return
    try:
        check_overrides(sys.argv[1:], config_name)
        sys.argv += choices_of_keys(sys.argv[1:]) if config_name == "config" else []
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            sys.argv[1:] = with_swept_groups(sys.argv[1:])
        if any(word in ("-sc", "--shell-completion") for word in sys.argv[1:]):
            _complete(start)
        else:
            start()
        RememberSweep.job = None
        while RememberSweep.held:  # by now everything else is done, and what is held is waited for
            context = HydraContext(None, Callbacks())  # type: ignore[arg-type]  # a loader is not needed
            run_hydra_job(task, RememberSweep.held.pop(0), "hydra.sweep.dir", "hydra.sweep.subdir", context)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenPipeError:
        end_without_reader()
    except OSError as error:  # of Hydra's own folders and files, which do not always say which they are
        path = Path(error.filename) if error.filename else RememberSweep.folder or Path("the output folder")
        raise SystemExit(f"error: {cannot_write(error, path) or explain(error, config_name)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise SystemExit(f"error: {explain(error, config_name)}") from None
