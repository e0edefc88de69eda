"""Tables: one data frame as CSV, Markdown and LaTeX."""

from collections.abc import Sequence
from pathlib import Path

import pandas

from sparsewav.files import write_file


def write_table(folder: Path, name: str, title: str, table: pandas.DataFrame, notes: Sequence[str]) -> None:
    """Write ``<name>.csv``, ``<name>.md`` and ``<name>.tex``.

    Args:
        folder: where to.
        name: of the files.
        title: caption.
        table: cells as they are to be printed; a missing one becomes a dash.
        notes: sentences below the table.
    """
    printed = table.astype(object).where(table.notna(), "–")
    with write_file(folder / f"{name}.csv") as path:
        table.to_csv(path, index=False)
    with write_file(folder / f"{name}.md") as path:
        path.write_text(_markdown(title, printed, notes), encoding="utf-8")
    with write_file(folder / f"{name}.tex") as path:
        path.write_text(_latex(name, title, printed, notes), encoding="utf-8")


def mean_and_deviation(values: Sequence[float] | pandas.Series, digits: int = 2) -> str:
    """Format ``mean ± standard deviation``, or the one value there is."""
    series = pandas.Series(values)
    if len(series) == 1:
        return f"{series.iloc[0]:.{digits}f}"
    return f"{series.mean():.{digits}f} ± {series.std():.{digits}f}"


def _markdown(title: str, table: pandas.DataFrame, notes: Sequence[str]) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join([f"# {title}", "", *lines, "", *(f"- {note}" for note in notes), ""])


_LATEX = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "±": r"$\pm$", "–": "--", "≤": r"$\leq$", "α": r"$\alpha$"}


def _latex(name: str, title: str, table: pandas.DataFrame, notes: Sequence[str]) -> str:
    def escape(text: object) -> str:
        return "".join(_LATEX.get(character, character) for character in str(text))

    body = table.rename(columns=escape).map(escape).style.hide(axis="index")
    tabular = body.to_latex(hrules=True, column_format="l" + "r" * (len(table.columns) - 1))
    caption = " ".join([f"{title}.", *notes])
    return (
        "% \\usepackage{booktabs}\n\\begin{table}\n\\centering\n"
        f"\\caption{{{escape(caption)}}}\n\\label{{tab:{name}}}\n{tabular}\\end{{table}}\n"
    )
