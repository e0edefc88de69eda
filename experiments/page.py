"""One page with every table and figure: self-contained, and readable on a phone."""

import base64
import json
import shlex
from html import escape
from pathlib import Path

import pandas

from experiments.results import Item, Result
from experiments.sweeps import Scale, jobs
from sparsewav.files import write_file
from sparsewav.pipeline import run_folder

STYLE = """
:root { color-scheme: light dark; --line: #d5d5d5; --quiet: #666; --back: #f6f6f6 }
@media (prefers-color-scheme: dark) { :root { --line: #444; --quiet: #aaa; --back: #222 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
nav a { margin-right: .8rem; white-space: nowrap }
p { overflow-wrap: anywhere }
.wide { overflow-x: auto }
@media (min-width: 62rem) { .wide { width: fit-content; max-width: 96vw; position: relative; left: 50%;
  transform: translateX(-50%) } }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line) }
th { vertical-align: bottom } th:first-child, td:first-child { text-align: left }
td { white-space: nowrap } td.long { white-space: normal; min-width: 8rem }
img { width: 100%; max-width: 46rem; height: auto; background: white }
ul { color: var(--quiet); font-size: .88rem; padding-left: 1.2rem; overflow-wrap: anywhere }
pre { background: var(--back); padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8rem }
@media (max-width: 48rem) { /* every row becomes a list of its cells: nothing is cut off, nothing has to be scrolled */
  thead { display: none }
  table, tbody, tr, td { display: block; min-width: 0 }
  tr { border: 1px solid var(--line); border-radius: .3rem; margin: .6rem 0; padding: .3rem .6rem }
  td, td.long, td:first-child { display: flex; justify-content: space-between; gap: 1rem; min-width: 0;
    padding: .15rem 0; border: 0; text-align: right; white-space: normal; overflow-wrap: anywhere }
  td::before { content: attr(data-column); color: var(--quiet); text-align: left; overflow-wrap: normal }
  td:first-child { font-weight: 600; text-align: left }
  td:first-child::before { content: none }
  td.missing { display: none }
}
"""

LONG = 24
"""Letters of a cell that may be broken into lines."""


def write_page(scale: Scale, results: list[tuple[Item, Result]]) -> Path:
    """Write ``index.html`` with the results given, in their order; returns its path."""
    path = scale.folder / "index.html"
    links = " ".join(f'<a href="#{item.name}">{escape(item.short)}</a>' for item, _ in results)
    sections = "".join(_section(item, result, scale) for item, result in results)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>SparseWAV, {scale.name} scale</title><style>{STYLE}</style></head><body>\n"
        f"<h1>SparseWAV: the paper's tables and figures at {scale.name} scale</h1>\n"
        "<p>Columns and claims marked as the paper's are its own figures; everything else was measured by the runs in "
        f"<code>{escape(str(scale.folder))}</code>.</p>\n<nav>{links}</nav>\n{sections}</body></html>\n"
    )
    with write_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _section(item: Item, result: Result, scale: Scale) -> str:
    body = ""
    if result.files[0].suffix == ".png":
        picture = base64.b64encode(result.files[0].read_bytes()).decode()
        body = f'<img alt="{escape(item.title)}" src="data:image/png;base64,{picture}">'
    if result.table is not None:
        body += f'<div class="wide">{_table(result.table)}</div>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    runs = len(_folders(item, scale))
    commands = "\n".join([reproduce_command(item, scale), *(sweep.command(scale) for sweep in item.sweeps)])
    files = ", ".join(f'<a href="{escape(path.name)}">{escape(path.name)}</a>' for path in result.files)
    return (
        f'<section id="{item.name}"><h2>{escape(item.title)}</h2>\n{body}\n<ul>{notes}</ul>\n'
        f"<p>Files: {files}; the CSV's column <code>runs</code> has the folders of the runs behind every row. "
        f"{_cost(item, scale)} Made of {runs} runs by the first command, which launches the others:</p>"
        f"<pre>{escape(commands)}</pre></section>\n"
    )


def reproduce_command(item: Item, scale: Scale) -> str:
    """The command that makes an item, with its folder and settings, but without a launcher, which changes no result."""
    words = ["./reproduce.sh", scale.name, item.name]
    words += ["--output", str(scale.folder)] * (not scale.usual)
    return shlex.join([*words, *(["--", *scale.overrides] if scale.overrides else [])])


def _folders(item: Item, scale: Scale) -> list[Path]:
    """The folders of an item's runs, which its sweeps may share."""
    return list(dict.fromkeys(job.folder for sweep in item.sweeps for job in jobs(sweep, scale)))


def _cost(item: Item, scale: Scale) -> str:
    """What the runs of an item cost, and what sharing their statistics saved."""
    spent, saved = 0.0, 0.0
    for folder in _folders(item, scale):
        metrics = json.loads((folder / run_folder.METRICS).read_text())
        seconds, cached = metrics["seconds"], metrics["seconds_cached"]
        shared = sum(spent for piece, spent in cached.items() if piece != "evaluate")
        spent += seconds["prune"] + seconds.get("finetune", 0.0) - shared
        saved += shared
    return (
        f"Pruning and tuning took {spent:,.0f} s; Hessians and sensitivities shared between runs saved {saved:,.0f} s "
        "more."
    )


def _table(table: pandas.DataFrame) -> str:
    columns = [escape(str(column)).replace(" %", "&nbsp;%") for column in table.columns]
    rows = ""
    for row in table.astype(object).where(table.notna(), "–").itertuples(index=False):
        rows += "<tr>"
        for column, cell in zip(columns, row, strict=True):
            kind = "missing" if cell == "–" else "long" if len(str(cell)) > LONG else ""
            text = escape(str(cell)).replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%")
            rows += f'<td data-column="{column}" class="{kind}">{text}</td>'
        rows += "</tr>\n"
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table>"
