"""Reports as text: Markdown, LaTeX and HTML, from the same tables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape as html_escape
from pathlib import Path
from urllib.parse import quote

from tabulate import tabulate

from reports.cells import Cell, Table
from reports.document import build_reports
from reports.figures import Figure, to_svg, write_figures
from reports.load import load_run
from reports.tables import Report

SUFFIXES = {"markdown": "md", "latex": "tex", "html": "html"}
LONGEST = 40  # rows of a table on a page


def write_reports(run_folder: Path) -> None:
    """Write report.md, report.tex and report.html into a run folder, and the figures into figures/."""
    reports = build_reports([load_run(run_folder)], cases=True)
    _write_figures(reports, run_folder / "figures")
    for name, render in RENDERERS.items():
        write_text(run_folder / f"report.{SUFFIXES[name]}", render(reports, "figures"))


def write_report(path: Path, reports: Sequence[Report], form: str) -> None:
    """Write a report in one of the formats; what it includes is put into STEM-figures beside it."""
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem) + "-figures"
    if form != "html":
        _write_figures(reports, path.parent / folder)
    write_text(path, RENDERERS[form](reports, folder))


def _write_figures(reports: Sequence[Report], folder: Path) -> None:
    for report in reports:
        if report.figures:
            write_figures(report.figures, folder / report.folder)


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


def to_markdown(reports: Sequence[Report], figures: str | None = None) -> str:
    """Pipe tables, as GitHub shows them. figures: where they lie; None: they are only named."""
    return "\n".join(_markdown_report(report, figures) for report in reports)


def _markdown_report(report: Report, figures: str | None) -> str:
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
    if figures is None:
        parts += [_md(line) for line in _named(report)]
    else:
        for figure in report.figures:
            path = quote(_place(figure, report, figures, "svg"))
            parts += [f"## {_md(figure.title)}", f"![{_md(figure.title)}]({path})", _md(figure.caption)]
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
\extrafloats{200}
\makeatletter  % titles have the paper's numbers where they have any
\renewcommand{\@makecaption}[2]{\vskip\abovecaptionskip{\sbox\@tempboxa{#2}%
  \ifdim\wd\@tempboxa>\hsize\raggedright\else\centering\fi#2\par}\vskip\belowcaptionskip}
\makeatother
% What is wider than the text is scaled down to it.
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


def to_latex(reports: Sequence[Report], figures: str | None = None) -> str:
    """A complete document with booktabs tables. figures: where they lie; None: they are only named."""
    body = "\n\\clearpage\n".join(_latex_report(report, figures) for report in reports)
    return f"{_LATEX_HEAD}{body}\\end{{document}}\n"


def latex_escape(text: str) -> str:
    """The text as pdflatex prints it; a character its fonts may not have is named by its number."""
    characters = " ".join(text.split())
    escaped = "".join(_LATEX_NAMES.get(character) or _latex_character(character) for character in characters)
    return re.sub("-(?=-)", "-{}", escaped)  # --flag keeps its two hyphens


def _latex_character(character: str) -> str:
    known = " " <= character <= "~" or ("À" <= character <= "ÿ")
    return character if known else rf"\texttt{{U+{ord(character):04X}}}"


def _latex_report(report: Report, figures: str | None) -> str:
    parts = [rf"\section*{{{latex_escape(report.title)}}}"]
    facts = [
        rf"\textbf{{{latex_escape(what)}:}} {latex_escape(value.rstrip('.'))}."
        for what, value in report.facts
    ]
    parts += ["\n".join(facts)]
    parts += [rf"\par\smallskip\textit{{{latex_escape(warning)}}}" for warning in report.warnings]
    parts += [_latex_table(page) for table in report.tables for page in _pages(table)]
    if figures is None:
        parts += [latex_escape(line) for line in _named(report)]
    else:
        parts += [_latex_figure(f, _place(f, report, figures, "pdf")) for f in report.figures]
    return "\n\n".join(parts) + "\n"


def _pages(table: Table) -> Iterator[Table]:
    """The table in parts that fit on a page; the notes stand under the last."""
    for start in range(0, max(len(table.rows), 1), LONGEST):
        end = start + LONGEST
        yield replace(
            table,
            title=f"{table.title} (continued)" if start else table.title,
            rows=table.rows[start:end],
            notes=table.notes if end >= len(table.rows) else (),
            groups=tuple(index - start for index in table.groups if start < index < end),
        )


def _latex_figure(figure: Figure, path: str) -> str:
    return "\n".join(
        (
            r"\begin{figure}[!htbp]",
            r"\centering",
            rf"\begin{{fittable}}\includegraphics{{{path}}}\end{{fittable}}\par",
            rf"\caption{{{latex_escape(figure.title)}. {latex_escape(figure.caption)}}}",
            r"\end{figure}",
        )
    )


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
  --warn: #fff6df; --link: #0b5cad; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --quiet: #9aa0ad; --rule: #3a3f4a; --strong: #e6e8ec; --back: #16181d; --warn: #3a3215;
    --link: #8ab8ff; }}
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
td a {{ color: var(--link); text-decoration: none; }}
td a:hover, td a:focus {{ text-decoration: underline; }}
h1 + dl {{ margin-bottom: 1rem; }}
h1:not(:first-of-type) {{ margin-top: 4rem; }}
figure {{ margin: 0; max-width: 60rem; overflow-x: auto; }}
figure svg {{ max-width: 100%; height: auto; background: #fff; }}
figcaption {{ color: var(--quiet); font-size: .87rem; }}
</style>
</head>
<body>
"""


def to_html(reports: Sequence[Report], figures: str | None = None) -> str:
    """One page that needs nothing else; the figures are in it, wherever else they lie."""
    title = ", ".join(report.title for report in reports)
    body = "\n".join(_html_report(report) for report in reports)
    return f"{_HTML_HEAD.format(title=html_escape(title))}{body}\n</body>\n</html>\n"


def _html_report(report: Report) -> str:
    parts = [f"<h1>{html_escape(report.title)}</h1>", "<dl>"]
    parts += [f"<dt>{html_escape(what)}</dt><dd>{html_escape(value)}</dd>" for what, value in report.facts]
    parts += ["</dl>", *(f'<p class="warning">{html_escape(warning)}</p>' for warning in report.warnings)]
    parts += [*map(_html_table, report.tables), *map(_html_figure, report.figures)]
    return "\n".join([*parts, report.cases] if report.cases else parts)


def _html_figure(figure: Figure) -> str:
    title, caption = html_escape(figure.title), html_escape(figure.caption)
    return f"<h2>{title}</h2>\n<figure>\n{to_svg(figure)}\n<figcaption>{caption}</figcaption>\n</figure>"


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
    text = wrap.format(html_escape(cell.text))
    parts = [f'<a href="{html_escape(cell.link)}">{text}</a>' if cell.link else text]
    if cell.interval:
        parts.append(f"<small>[{html_escape(cell.interval)}]</small>")
    if cell.difference:
        parts.append(f"<small>({html_escape(cell.difference)})</small>")
    return " ".join(parts)


# Shared


def _place(figure: Figure, report: Report, folder: str, suffix: str) -> str:
    """The path of a figure's file, from the document's folder."""
    return "/".join(part for part in (folder, report.folder, f"{figure.name}.{suffix}") if part)


def _named(report: Report) -> list[str]:
    """A line with the figures that are not shown."""
    if not report.figures:
        return []
    return [
        f"Figures, drawn where the report is written to a file: {'; '.join(f.title for f in report.figures)}."
    ]


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


RENDERERS: dict[str, Callable[[Sequence[Report], str | None], str]] = {
    "markdown": to_markdown,
    "latex": to_latex,
    "html": to_html,
}
