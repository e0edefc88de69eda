"""Console command ``sparsewav-wandb-report``: a report or a workspace on W&B that compares the runs of sweeps."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsewav.cli.command import command_parser, exit_on_user_error
from sparsewav.errors import UserError
from sparsewav.files import conf_folder

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

    from sparsewav.cli.sweep_runs import Sweep

_EPILOG = """examples:
  sparsewav-wandb-report outputs/sweep-1a2b3c4d --entity me      a sweep that was run with tracker=wandb
  sparsewav-wandb-report outputs/methods --entity me --workspace
  sparsewav-wandb-report --entity me                             the paper's experiments, from ./reproduce.sh
"""


@dataclass(frozen=True)
class Part:
    """A part of a report, or a section of a workspace.

    Attributes:
        title: Its heading.
        groups: Whose runs it shows: the experiments' names, or those of the folders of sweeps.
        panels: Its plots.
    """

    title: str
    groups: tuple[str, ...]
    panels: list[Any]

    @property
    def runs(self) -> str:
        """The filter of its runs, as W&B reads it."""
        return f"Group in [{', '.join(repr(name) for name in self.groups)}]"


def paper_parts() -> list[Part]:
    """Compare what the paper compares: the ablations as bars, the curves over sparsity, the seconds to prune."""
    experiments = [
        ("Ablation at 75 % sparsity", ("paper/ablation_one_shot", "paper/ablation_finetune")),
        ("WER over sparsity", ("paper/curve_one_shot", "paper/curve_one_pass", "paper/curve_progressive")),
        ("Time to prune", ("paper/timing",)),
    ]
    for _, names in experiments:
        assert all((conf_folder() / "experiment" / f"{name}.yaml").is_file() for name in names)
    panels = [
        [_bars("wer", axis, f"{axis}.name") for axis in ("saliency", "allocation", "finetune_strategy")],
        [_scatter("wer"), *_curves()],
        [_seconds("model", "pruned_model")],
    ]
    return [Part(title, names, shown) for (title, names), shown in zip(experiments, panels, strict=True)]


def sweep_part(sweep: "Sweep") -> Part:
    """Compare the runs of a sweep by everything that varies in it.

    Raises:
        UserError: The folder has no finished run.
    """
    if sweep.runs.empty or not (sweep.runs["status"] == "done").any():
        raise UserError(f"{sweep.folder} has no finished runs; give the folder of a sweep")
    metric = "wer" if sweep.any("wer") else "divergence"
    axes = {axis: _config_key(axis) for axis in sweep.axes if axis != "run"}
    panels = [_bars(metric, axis, key) for axis, key in axes.items()]
    if sweep.any("cer"):
        panels += [_bars("cer", axis, key) for axis, key in axes.items()]
    if sweep.varies("target_sparsity"):
        panels.insert(0, _scatter(metric))
    if sweep.any("updates"):
        panels += _curves()
    first, *_ = [*axes, "model"]
    panels.append(_seconds(first, _config_key(first)))
    experiment = sweep.shared.get("experiment")
    group = experiment if isinstance(experiment, str) else sweep.folder.resolve().name
    return Part(f"{sweep.folder.resolve().name}: {', '.join(axes) or 'one run'}", (group,), panels)


def build_report(entity: str, project: str, parts: Sequence[Part]) -> "Report":
    """Build a report; nothing is sent yet."""
    import wandb_workspaces.reports.v2 as reports

    blocks: list[Any] = []
    for part in parts:
        runs = reports.Runset(entity=entity, project=project, name=" and ".join(part.groups), filters=part.runs)
        blocks += [reports.H1(part.title), reports.PanelGrid(runsets=[runs], panels=part.panels)]
    return reports.Report(entity=entity, project=project, title="SparseWAV", blocks=blocks)


def build_workspace(entity: str, project: str, parts: Sequence[Part]) -> "Workspace":
    """Build a workspace with a section for every part; nothing is sent yet."""
    import wandb_workspaces.workspaces as workspaces

    groups = tuple(dict.fromkeys(group for part in parts for group in part.groups))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="SparseWAV",
        sections=[workspaces.Section(name=part.title, panels=part.panels, is_open=True) for part in parts],
        runset_settings=workspaces.RunsetSettings(filters=Part("", groups, []).runs),
    )


def _config_key(axis: str) -> str:
    """Give the key of a tracked run's configuration that has a setting; the options of groups are listed apart."""
    if axis == "model":
        return "pruned_model"
    return f"options.{axis}" if (conf_folder() / axis).is_dir() else axis


def _bars(metric: str, axis: str, key: str) -> Any:
    import wandb_workspaces.reports.v2 as reports

    return reports.BarPlot(
        title=f"{_name(metric)} by {axis}",
        metrics=[reports.SummaryMetric(metric)],
        groupby=reports.Config(key),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        title_x=_name(metric),
    )


def _scatter(metric: str) -> Any:
    import wandb_workspaces.reports.v2 as reports

    x, y = reports.SummaryMetric("achieved_sparsity"), reports.SummaryMetric(metric)
    return reports.ScatterPlot(title=f"{_name(metric)} over the sparsity that was reached", x=x, y=y, log_y=True)


def _curves() -> list[Any]:
    import wandb_workspaces.reports.v2 as reports

    return [
        reports.LinePlot(title="Loss while tuning", x="finetune/update", y=["finetune/loss"], log_y=True),
        reports.LinePlot(title="WER of the stages", x="stage/sparsity", y=["stage/wer_pruned", "stage/wer"]),
    ]


def _seconds(axis: str, key: str) -> Any:
    import wandb_workspaces.reports.v2 as reports

    return reports.BarPlot(
        title=f"Seconds to prune by {axis}",
        metrics=[reports.SummaryMetric(f"seconds.{piece}") for piece in ("calibrate", "allocate", "solve")],
        groupby=reports.Config(key),
        groupby_aggfunc="mean",
        title_x="seconds",
    )


def _name(metric: str) -> str:
    return metric if metric == "divergence" else metric.upper()


def main() -> None:
    """Console entry ``sparsewav-wandb-report``: build the report or workspace, and save it to W&B."""
    parser = command_parser(
        "sparsewav-wandb-report",
        "Make a report, or a workspace, on Weights & Biases that compares the runs of sweeps by what "
        "varies in them; they were run with tracker=wandb.",
        _EPILOG,
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="of a sweep (without one: the paper's experiments)"
    )
    parser.add_argument("--entity", required=True, help="user or team on W&B")
    parser.add_argument("--project", default="sparsewav", help="default: sparsewav")
    parser.add_argument("--workspace", action="store_true", help="make a workspace, which is live, and no report")
    arguments = parser.parse_args()
    with exit_on_user_error():
        url = _save(arguments)
    print(url)


def _save(arguments: argparse.Namespace) -> str:
    from sparsewav.cli.sweep_runs import read_sweep

    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise UserError(
            "wandb-workspaces is not installed; install it: pip install 'sparsewav[wandb-report]'"
        ) from None
    for folder in arguments.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of a sweep")
    parts = [sweep_part(read_sweep(folder)) for folder in arguments.folders] or paper_parts()
    build: Any = build_workspace if arguments.workspace else build_report
    try:
        return build(arguments.entity, arguments.project, parts).save().url
    except Exception as error:  # wandb-workspaces raises the bare class when nobody is logged in
        login = "" if "wandb login" in str(error) else "; log in first (wandb login)"
        raise UserError(f"W&B does not save it: {error}{login}") from None
