"""Tables: printed cells as Markdown and LaTeX, and what they were made of as CSV."""

import re
from collections.abc import Sequence

import pandas

from experiments.results import Item, Result
from experiments.sweeps import Scale
from sparsewav.files import write_file


def write_table(
    item: Item,
    scale: Scale,
    table: pandas.DataFrame,
    notes: list[str],
    values: pandas.DataFrame,
    in_paper: Sequence[str],
    beside: Sequence[str] = (),
) -> Result:
    """Write ``<item>.csv``, ``<item>.md`` and ``<item>.tex``.

    Args:
        item: The table's name and title.
        scale: Its folder is where the files go.
        table: Cells as they are to be printed; a missing one becomes a dash.
        notes: Sentences below the table.
        values: The rows of the CSV: every number in a column of its own, and the runs that it is from.
        in_paper: The columns that the LaTeX table has, which must fit a page.
        beside: Notes on the other columns.

    Returns:
        The printed table with its notes and files.
    """
    everything = [*notes, *beside]
    printed = table.astype(object).where(table.notna(), "–")
    files = item.files(scale, "csv", "md", "tex")
    _, markdown, latex = files
    write_values(item, scale, values)
    with write_file(markdown) as path:
        path.write_text(_markdown(item.title, printed, everything), encoding="utf-8")
    with write_file(latex) as path:
        path.write_text(latex_table(item.name, item.caption, printed[list(in_paper)], notes), encoding="utf-8")
    return Result(everything, files, table)


def write_values(item: Item, scale: Scale, values: pandas.DataFrame) -> None:
    """Write ``<item>.csv``."""
    (csv,) = item.files(scale, "csv")
    with write_file(csv) as path:
        # A column of counts in which one is missing is still one of whole numbers.
        whole = [key for key, column in values.select_dtypes("float").items() if not (column.dropna() % 1).any()]
        values.astype(dict.fromkeys(whole, "Int64")).to_csv(path, index=False, float_format="%.6g")


def mean_and_deviation(values: Sequence[float] | pandas.Series, digits: int = 2) -> str:
    """Format ``mean ± standard deviation``, or the one value there is."""
    series = pandas.Series(values)
    mean = f"{series.mean():.{digits}f}".replace("-", "−")
    return mean if len(series) == 1 else f"{mean} ± {series.std():.{digits}f}"


def _markdown(title: str, table: pandas.DataFrame, notes: Sequence[str]) -> str:
    def escape(cell: object) -> str:
        return str(cell).replace("|", r"\|")

    rows = [list(table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    return "\n".join([f"# {title}", "", *lines, "", *(f"- {note}" for note in notes), ""])


_LATEX = {
    **{character: f"\\{character}" for character in "%&_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "α": r"$\alpha$",
    "Ŵ": r"$\hat{W}$",
    "²": "$^2$",
    "†": r"\dag{}",
}


LONG = 35
LETTERS = 75
"""Letters of a cell that is broken into lines in LaTeX, and of a row that is set smaller."""


def latex_table(name: str, caption: str, table: pandas.DataFrame, notes: Sequence[str]) -> str:
    """A table that needs the package booktabs alone: LaTeX numbers its caption, and the notes stand below it."""

    def escape(text: object) -> str:
        return "".join(_LATEX.get(character, character) for character in str(text))

    def row(cells: Sequence[object]) -> str:
        return " & ".join(map(escape, cells)) + r" \\"

    longest, *others = (max(len(str(cell)) for cell in [column, *table[column]]) for column in table)
    wide = longest + sum(others) > LETTERS
    first = r"p{0.22\linewidth}" if longest > LONG else "l"
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering" + (r"\scriptsize\setlength{\tabcolsep}{3pt}" if wide else r"\small\setlength{\tabcolsep}{4pt}"),
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', name)}}}",
        rf"\begin{{tabular}}{{{first}{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        row(list(table.columns)),
        r"\midrule",
        *(row(cells) for cells in table.itertuples(index=False)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\medskip",
        r"\begin{minipage}{\linewidth}\footnotesize\raggedright",
        *(rf"{escape(note)}\par" for note in notes),
        r"\end{minipage}",
        r"\end{table}",
    ]
    return "\n".join([*lines, ""])
