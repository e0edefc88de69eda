"""Tables: one data frame as CSV, Markdown and LaTeX."""

from collections.abc import Sequence

import pandas

from experiments.results import Item, Result
from experiments.sweeps import Scale
from sparsewav.files import write_file


def write_table(item: Item, scale: Scale, table: pandas.DataFrame, notes: list[str]) -> Result:
    """Write ``<item>.csv``, ``<item>.md`` and ``<item>.tex``.

    Args:
        item: The table's name and title.
        scale: Its folder is where the files go.
        table: Cells as they are to be printed; a missing one becomes a dash.
        notes: Sentences below the table.

    Returns:
        The table with its notes and files.
    """
    printed = table.astype(object).where(table.notna(), "–")
    csv, markdown, latex = files = item.files(scale, "csv", "md", "tex")
    with write_file(csv) as path:
        table.to_csv(path, index=False)
    with write_file(markdown) as path:
        path.write_text(_markdown(item.title, printed, notes), encoding="utf-8")
    with write_file(latex) as path:
        path.write_text(_latex(item.name, item.title, printed, notes), encoding="utf-8")
    return Result(notes, files, table)


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
