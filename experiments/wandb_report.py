"""``python -m experiments.wandb_report``: a W&B report that compares the ablations at a glance.

Track the sweeps first: ``./reproduce.sh -- tracker=wandb tracker.entity=me``.
"""

import argparse
from typing import Any

import wandb_workspaces.reports.v2 as reports

from sparsewav.files import conf_folder


def build_report(entity: str, project: str) -> reports.Report:
    """Build the report: ablation bars, curves over sparsity, and the seconds to prune; nothing is sent yet."""

    def runs(*experiments: str) -> reports.Runset:
        names = ", ".join(f"'{name}'" for name in experiments)
        return reports.Runset(
            entity=entity, project=project, name=" and ".join(experiments), filters=f"Group in [{names}]"
        )

    def grid(experiments: tuple[str, ...], *panels: Any) -> reports.PanelGrid:
        assert all((conf_folder() / "experiment" / f"{name}.yaml").is_file() for name in experiments)
        return reports.PanelGrid(runsets=[runs(*experiments)], panels=list(panels))

    wer = reports.SummaryMetric("wer")
    sparsity = reports.SummaryMetric("achieved_sparsity")
    bars = [
        reports.BarPlot(
            title=f"WER by {axis}",
            metrics=[wer],
            groupby=reports.Config(f"{axis}.name"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            title_x="WER",
        )
        for axis in ("saliency", "allocation", "finetune_strategy")
    ]
    curves = [
        reports.ScatterPlot(title="WER over the sparsity that was reached", x=sparsity, y=wer, log_y=True),
        reports.LinePlot(title="Loss while tuning", x="finetune/update", y=["finetune/loss"], log_y=True),
        reports.LinePlot(title="WER of the stages", x="stage/sparsity", y=["stage/wer_pruned", "stage/wer"]),
    ]
    seconds = reports.BarPlot(
        title="Seconds to prune",
        metrics=[reports.SummaryMetric(f"seconds.{piece}") for piece in ("calibrate", "allocate", "solve")],
        groupby=reports.Config("pruned_model"),
        groupby_aggfunc="mean",
        title_x="seconds",
    )
    return reports.Report(
        entity=entity,
        project=project,
        title="SparseWAV: ablations",
        description="Table 1, Figures 1 to 4 and Table 3 from the tracked sweeps of ./reproduce.sh",
        blocks=[
            reports.H1("Ablation at 75 % sparsity"),
            grid(("paper/ablation_one_shot", "paper/ablation_finetune"), *bars),
            reports.H1("WER over sparsity"),
            grid(("paper/curve_one_shot", "paper/curve_one_pass", "paper/curve_progressive"), *curves),
            reports.H1("Time to prune"),
            grid(("paper/timing",), seconds),
        ],
    )


def main() -> None:
    """Build the report and save it to W&B."""
    parser = argparse.ArgumentParser(prog="python -m experiments.wandb_report", description=__doc__)
    parser.add_argument("--entity", required=True, help="user or team on W&B")
    parser.add_argument("--project", default="sparsewav")
    arguments = parser.parse_args()
    try:
        report = build_report(arguments.entity, arguments.project).save()
    except Exception as error:  # wandb-workspaces raises the bare class when nobody is logged in
        raise SystemExit(f"error: the report cannot be saved: {error}; log in first (wandb login)") from None
    print(report.url)


if __name__ == "__main__":
    main()
