"""Reports as text: Markdown, LaTeX and HTML, from the same tables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from html import escape as html_escape
from pathlib import Path

from tabulate import tabulate

from reports.load import load_run
from reports.tables import Cell, Report, Table, build_report

SUFFIXES = {"markdown": "md", "latex": "tex", "html": "html"}


def write_reports(run_folder: Path) -> None:
    """Write report.md, report.tex and report.html into a run folder, each in one step."""
    report = build_report(load_run(run_folder))
    for name, render in RENDERERS.items():
        write_text(run_folder / f"report.{SUFFIXES[name]}", render([report]))


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Markdown


def to_markdown(reports: Sequence[Report]) -> str:
    """Pipe tables, as GitHub shows them."""
    return "\n".join(_markdown_report(report) for report in reports)


def _markdown_report(report: Report) -> str:
    parts = [f"# {_md(report.title)}", "\n".join(f"- {what}: {_md(value)}" for what, value in report.facts)]
    parts += [f"> {_md(warning)}" for warning in report.warnings]
    for table in report.tables:
        rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
        text = tabulate(
            rows,
            [_md(h) for h in table.headers],
            tablefmt="pipe",
            colalign=_alignment(table),
            disable_numparse=True,
        )
        parts += [f"## {_md(table.title)}", text]
        parts += ["\n".join(f"- {_md(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_cell(cell: Cell) -> str:
    wrap = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}[cell.mark]
    return _joined(wrap.format(_md(cell.text)), cell)


def _md(text: str) -> str:
    """One line in which nothing is markup."""
    text = " ".join(text.split())
    for character in "\\|*`<[":
        text = text.replace(character, f"\\{character}")
    return text


# LaTeX

_LATEX_HEAD = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\setlength{\parindent}{0pt}
\setlength{\tabcolsep}{4pt}
\sloppy
% A table wider than the text is scaled down to it.
\newsavebox{\tablebox}
\newenvironment{fittable}{\begin{lrbox}{\tablebox}}{\end{lrbox}%
  \ifdim\wd\tablebox>\textwidth\resizebox{\textwidth}{!}{\usebox{\tablebox}}\else\usebox{\tablebox}\fi}
\begin{document}
"""

_LATEX_NAMES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after \\ a bracket or a star would be an argument
    "]": "{]}",
    "*": "{*}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "…": r"\ldots{}",
    "×": r"$\times$",
    "−": "$-$",
    "±": r"$\pm$",
}


def to_latex(reports: Sequence[Report]) -> str:
    """A complete document with booktabs tables."""
    body = "\n\\clearpage\n".join(_latex_report(report) for report in reports)
    return f"{_LATEX_HEAD}{body}\\end{{document}}\n"


def latex_escape(text: str) -> str:
    """The text as pdflatex prints it; a character its fonts may not have is named by its number."""
    characters = " ".join(text.split())
    escaped = "".join(_LATEX_NAMES.get(character) or _latex_character(character) for character in characters)
    return re.sub("-(?=-)", "-{}", escaped)  # --flag keeps its two hyphens


def _latex_character(character: str) -> str:
    known = " " <= character <= "~" or ("À" <= character <= "ÿ")
    return character if known else rf"\texttt{{U+{ord(character):04X}}}"


def _latex_report(report: Report) -> str:
    parts = [rf"\section*{{{latex_escape(report.title)}}}"]
    facts = [
        rf"\textbf{{{latex_escape(what)}:}} {latex_escape(value.rstrip('.'))}."
        for what, value in report.facts
    ]
    parts += ["\n".join(facts)]
    parts += [rf"\par\smallskip\textit{{{latex_escape(warning)}}}" for warning in report.warnings]
    parts += [_latex_table(table) for table in report.tables]
    return "\n\n".join(parts) + "\n"


def _latex_table(table: Table) -> str:
    rows = [[_latex_cell(cell) for cell in row] for row in table.rows]
    for index in table.groups:
        rows[index][0] = rf"\addlinespace {rows[index][0]}"
    headers = [latex_escape(header) for header in table.headers]
    text = tabulate(rows, headers, tablefmt="latex_raw", colalign=_alignment(table), disable_numparse=True)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        text = text.replace(r"\hline", rule, 1)
    notes = "\n".join(rf"\par\smallskip {latex_escape(note)}" for note in table.notes)
    return "\n".join(
        part
        for part in (
            r"\begin{table}[!htbp]",
            r"\centering",
            rf"\caption{{{latex_escape(table.title)}}}",
            r"\begin{fittable}",
            text,
            r"\end{fittable}\par",
            rf"{{\raggedright\footnotesize{notes}\par}}" if notes else "",
            r"\end{table}",
        )
        if part
    )


def _latex_cell(cell: Cell) -> str:
    wrap = {"": "%s", "best": r"\textbf{%s}", "second": r"\underline{%s}"}[cell.mark]
    parts = [wrap % _latex_number(cell.text)]
    if cell.interval:
        parts.append(rf"{{\scriptsize [{_latex_number(cell.interval)}]}}")
    if cell.difference:
        parts.append(rf"{{\scriptsize ({_latex_number(cell.difference)})}}")
    return " ".join(parts)


def _latex_number(text: str) -> str:
    """Escaped, with true minus signs before digits."""
    number = "".join(character for character in text if character not in "+-., ").isdigit()
    return text.replace("-", "$-$").replace("+", "$+$") if number else latex_escape(text)


# HTML

_HTML_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --quiet: #667; --rule: #d5d8de; --strong: #23262d; --back: #fff;
  --warn: #fff6df; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --quiet: #9aa0ad; --rule: #3a3f4a; --strong: #e6e8ec; --back: #16181d; --warn: #3a3215; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--strong); background: var(--back);
  max-width: 76rem; margin: 2.5rem auto; padding: 0 1.5rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 1rem; }}
h2 {{ font-size: 1.05rem; margin: 2.5rem 0 .5rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: 0; }}
dt {{ color: var(--quiet); }}
dd {{ margin: 0; }}
.warning {{ background: var(--warn); padding: .5rem .8rem; border-radius: .3rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap;
  border-top: 2px solid var(--strong); border-bottom: 2px solid var(--strong); }}
th, td {{ padding: .3rem .9rem .3rem 0; text-align: left; }}
th {{ border-bottom: 1px solid var(--strong); font-weight: 600; }}
.right {{ text-align: right; }}
tr.group td {{ border-top: 1px solid var(--rule); }}
small {{ color: var(--quiet); }}
ul {{ color: var(--quiet); font-size: .87rem; padding-left: 1.1rem; margin: .6rem 0; max-width: 60rem; }}
u {{ text-underline-offset: .2em; }}
</style>
</head>
<body>
"""


def to_html(reports: Sequence[Report]) -> str:
    """One page that needs nothing else."""
    title = ", ".join(report.title for report in reports)
    body = "\n".join(_html_report(report) for report in reports)
    return f"{_HTML_HEAD.format(title=html_escape(title))}{body}\n</body>\n</html>\n"


def _html_report(report: Report) -> str:
    parts = [f"<h1>{html_escape(report.title)}</h1>", "<dl>"]
    parts += [f"<dt>{html_escape(what)}</dt><dd>{html_escape(value)}</dd>" for what, value in report.facts]
    parts += ["</dl>", *(f'<p class="warning">{html_escape(warning)}</p>' for warning in report.warnings)]
    return "\n".join([*parts, *map(_html_table, report.tables)])


def _html_table(table: Table) -> str:
    classes = [' class="right"' if side == "right" else "" for side in _alignment(table)]
    heads = "".join(f"<th{c}>{html_escape(h)}</th>" for c, h in zip(classes, table.headers, strict=True))
    lines = [
        f"<h2>{html_escape(table.title)}</h2>",
        '<div class="wide"><table>',
        f"<thead><tr>{heads}</tr></thead>",
    ]
    lines.append("<tbody>")
    for index, row in enumerate(table.rows):
        cells = "".join(f"<td{c}>{_html_cell(cell)}</td>" for c, cell in zip(classes, row, strict=True))
        group = ' class="group"' if index in table.groups else ""
        lines.append(f"<tr{group}>{cells}</tr>")
    lines.append("</tbody></table></div>")
    if table.notes:
        lines.append(f"<ul>{''.join(f'<li>{html_escape(note)}</li>' for note in table.notes)}</ul>")
    return "\n".join(lines)


def _html_cell(cell: Cell) -> str:
    wrap = {"": "{}", "best": "<strong>{}</strong>", "second": "<u>{}</u>"}[cell.mark]
    parts = [wrap.format(html_escape(cell.text))]
    if cell.interval:
        parts.append(f"<small>[{html_escape(cell.interval)}]</small>")
    if cell.difference:
        parts.append(f"<small>({html_escape(cell.difference)})</small>")
    return " ".join(parts)


# Shared


def _joined(text: str, cell: Cell) -> str:
    interval = f" [{cell.interval}]" if cell.interval else ""
    difference = f" ({cell.difference})" if cell.difference else ""
    return f"{text}{interval}{difference}"


def _alignment(table: Table) -> list[str]:
    """Columns of bare numbers to the right, unless the table has numbers with something behind them."""
    if any(cell.interval or cell.difference for row in table.rows for cell in row):
        return ["left"] * len(table.headers)
    columns = zip(*table.rows, strict=True)
    return [
        "left" if any(map(str.isalpha, "".join(c.text for c in column))) else "right" for column in columns
    ]


RENDERERS: dict[str, Callable[[Sequence[Report]], str]] = {
    "markdown": to_markdown,
    "latex": to_latex,
    "html": to_html,
}
