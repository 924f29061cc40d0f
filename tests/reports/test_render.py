from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.cells import Cell, Table
from reports.document import build_reports
from reports.figures import Figure, available
from reports.load import load_run
from reports.render import (
    LONGEST,
    latex_escape,
    to_html,
    to_latex,
    to_markdown,
    write_report,
    write_reports,
    write_text,
)
from reports.tables import Report

TABLE = Table(
    title="Results & more",
    headers=("Editor", "Cell", "Score"),
    rows=(
        (Cell(text=""), Cell(text="unedited"), Cell(text="33.3", interval="29.8, 36.3")),
        (Cell(text="MEMIT"), Cell(text="+MM (r=0.5)"), Cell(text="–")),
        (
            Cell(text="MEMIT"),
            Cell(text="+MM+R"),
            Cell(text="84.1", interval="80.2, 87.5", difference="+3.2", mark="best"),
        ),
        (Cell(text="RECT"), Cell(text="+R"), Cell(text="79.0", difference="-1.2", mark="second")),
    ),
    notes=("RECT: 100% of {x}_y | <b>",),
    groups=(1, 3),
)
REPORT = Report(title="a_run", facts=(("Model", "gpt2"),), warnings=("50% & less",), tables=(TABLE,))

MARKDOWN = """\
# a_run

- Model: gpt2

> 50% & less

## Results & more

| Editor   | Cell        | Score                         |
|:---------|:------------|:------------------------------|
|          | unedited    | 33.3 [29.8, 36.3]             |
| MEMIT    | +MM (r=0.5) | –                             |
| MEMIT    | +MM+R       | **84.1** [80.2, 87.5] (+3.2)  |
| RECT     | +R          | <u>79.0</u> (-1.2)            |

- RECT: 100% of {x}_y \\| \\<b>
"""

LATEX = r"""\section*{a\_run}

\textbf{Model:} gpt2.

\par\smallskip\textit{50\% \& less}

\begin{table}[!htbp]
\centering
\caption{Results \& more}
\begin{fittable}
\begin{tabular}{lll}
\toprule
 Editor & Cell & Score \\
\midrule
 & unedited & 33.3 {\scriptsize [29.8, 36.3]} \\
 \addlinespace MEMIT & +MM (r=0.5) & \textendash{} \\
 MEMIT & +MM+R & \textbf{84.1} {\scriptsize [80.2, 87.5]} {\scriptsize ($+$3.2)} \\
 \addlinespace RECT & +R & \underline{79.0} {\scriptsize ($-$1.2)} \\
\bottomrule
\end{tabular}
\end{fittable}\par
{\raggedright\footnotesize\par\smallskip RECT: 100\% of \{x\}\_y \textbar{} \textless{}b\textgreater{}\par}
\end{table}
"""


def squeezed(text: str) -> str:
    """Without the padding that depends on the widest cell of a column."""
    return re.sub(r"-{2,}", "--", re.sub(r" +", " ", text))


def test_markdown():
    assert squeezed(to_markdown([REPORT])) == squeezed(MARKDOWN)


def test_latex():
    body = to_latex([REPORT]).partition("\\begin{document}\n")[2].removesuffix("\\end{document}\n")
    assert squeezed(body) == squeezed(LATEX)


def test_html():
    page = to_html([REPORT])
    assert '<p class="warning">50% &amp; less</p>' in page
    assert "<td><strong>84.1</strong> <small>[80.2, 87.5]</small> <small>(+3.2)</small></td>" in page
    assert '<tr class="group"><td>RECT</td><td>+R</td><td><u>79.0</u> <small>(-1.2)</small></td></tr>' in page
    assert "<li>RECT: 100% of {x}_y | &lt;b&gt;</li>" in page
    assert "http" not in page


def test_several_runs_stand_one_after_the_other():
    assert to_markdown([REPORT, REPORT]).count("\n\n# a_run") == 1
    assert to_latex([REPORT, REPORT]).count(r"\clearpage") == 1
    assert to_html([REPORT, REPORT]).count("<h1>") == 2


def test_only_a_page_has_links():
    row = (Cell(text="84.1", mark="best", link="#cases?a=1&b=<"),)
    report = Report(
        title="r",
        facts=(),
        warnings=(),
        tables=(Table(title="t", headers=("Score",), rows=(row,)),),
        cases="<section>cases</section>",
    )
    page = to_html([report])
    assert '<a href="#cases?a=1&amp;b=&lt;"><strong>84.1</strong></a>' in page
    assert page.index("</table>") < page.index("<section>cases</section>")
    for text in (to_markdown([report]), to_latex([report])):
        assert "cases" not in text


def test_a_long_table_goes_on_on_the_next_page():
    rows = tuple((Cell(text=f"{i}"), Cell(text="x")) for i in range(LONGEST + 5))
    groups = (1, LONGEST, LONGEST + 2)
    table = Table(title="Long", headers=("a", "b"), rows=rows, notes=("A note.",), groups=groups)
    report = Report(title="r", facts=(), warnings=(), tables=(table,))
    first, second = to_latex([report]).split(r"\begin{table}")[1:]
    assert r"\caption{Long}" in first and r"\caption{Long (continued)}" in second
    assert (first.count(" & x"), second.count(" & x")) == (LONGEST, 5)
    assert "A note." not in first and "A note." in second
    assert (first.count("addlinespace"), second.count("addlinespace")) == (1, 1)
    assert to_markdown([report]).count("| x ") == LONGEST + 5


@pytest.fixture
def drawn():
    """A report with a figure, of a run that shares a document with others."""
    pytest.importorskip("matplotlib")

    def draw():
        from matplotlib.figure import Figure as Drawing

        drawing = Drawing(figsize=(2, 1))
        drawing.subplots().plot([0, 1], [1, 0])
        return drawing

    figure = Figure(name="decline", title="A decline, 100%", caption="It falls by a_b.", draw=draw)
    return Report(title="r", facts=(), warnings=(), tables=(), figures=(figure,), folder="run-2")


def test_figures_are_only_named_in_the_terminal(drawn):
    line = "Figures, drawn where the report is written to a file: A decline, 100%."
    assert line in to_markdown([drawn])
    assert line.replace("%", r"\%") in to_latex([drawn])


def test_figures_lie_beside_the_file_that_shows_them(drawn, tmp_path):
    out = tmp_path / "my report.md"
    write_report(out, [drawn], "markdown")
    text = out.read_text()
    assert "![A decline, 100%](my-report-figures/run-2/decline.svg)" in text and "It falls by a_b." in text
    assert (tmp_path / "my-report-figures" / "run-2" / "decline.svg").is_file()
    write_report(tmp_path / "r.tex", [drawn], "latex")
    text = (tmp_path / "r.tex").read_text()
    assert r"\includegraphics{r-figures/run-2/decline.pdf}" in text and r"It falls by a\_b." in text
    assert (tmp_path / "r-figures" / "run-2" / "decline.pdf").is_file()


def test_a_page_has_its_figures_in_it(drawn, tmp_path):
    write_report(tmp_path / "r.html", [drawn], "html")
    page = (tmp_path / "r.html").read_text()
    assert "<svg" in page and "<figcaption>It falls by a_b.</figcaption>" in page
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_bare_numbers_stand_to_the_right():
    table = Table(title="t", headers=("Editor", "Edit (s)"), rows=((Cell(text="FT"), Cell(text="1.25")),))
    report = Report(title="r", facts=(), warnings=(), tables=(table,))
    assert r"\begin{tabular}{lr}" in to_latex([report])
    assert '<td class="right">1.25</td>' in to_html([report])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a & b % c_d # $", r"a \& b \% c\_d \# \$"),
        ("{~^}", r"\{\textasciitilde{}\textasciicircum{}\}"),
        ("C:\\tmp", r"C:\textbackslash{}tmp"),
        ("--dtype –", r"-{}-dtype \textendash{}"),
        ("[x] *", "{[}x{]} {*}"),
        ("São → 漢", r"São \texttt{U+2192} \texttt{U+6F22}"),
        ("two\nlines\t", "two lines"),
    ],
)
def test_latex_escapes(text, expected):
    assert latex_escape(text) == expected


def unescaped(latex: str) -> str:
    """What is left of markup once the known escapes are taken out."""
    for known in (
        r"\\text[a-z]+\{\}",
        r"\\text[a-z]+\{U\+[0-9A-F]+\}",
        r"\\ldots\{\}",
        r"\$\\(times|pm)\$|\$-\$",
    ):
        latex = re.sub(known, "", latex)
    return re.sub(r"\\[{}$&#%_]|\{[\[\]*]\}|-\{\}", "", latex)


@given(st.text(max_size=40))
def test_no_special_character_survives_latex(text):
    assert not set(unescaped(latex_escape(text))) & set("\\{}$&#%_^~<>|[]*")


@given(st.text(max_size=40))
def test_any_text_is_one_markdown_cell(text):
    table = Table(title="t", headers=("a", "b"), rows=((Cell(text=text), Cell(text="x")),))
    markdown = to_markdown([Report(title="r", facts=(), warnings=(), tables=(table,))])
    row = markdown.rstrip("\n").rpartition("\n")[2]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "td"
        if self.inside:
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40))
def test_html_says_what_the_cell_says(text):
    table = Table(title="t", headers=("a",), rows=((Cell(text=text),),))
    parser = Texts()
    parser.feed(to_html([Report(title="r", facts=(), warnings=(), tables=(table,))]))
    assert parser.cells == [text]


def test_write_reports(ablation, write_run):
    folder = write_run(ablation)
    write_reports(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", "records.jsonl", "report.html", "report.md", "report.tex"} | (
        {"figures"} if available() else set()
    )
    write_reports(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text == to_markdown(build_reports([load_run(folder)]), "figures")
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(linked) == text.count("![") and all((folder / path).is_file() for path in linked)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_report_tex_compiles(ablation, record, write_run):
    odd = " ".join([*map(chr, range(32, 0x250)), *"–—…×−±漢𝔸"])
    folder = write_run([*ablation, record("a_b%", "[x]", error="{[")], model_note="100% & more", notes=[odd])
    write_reports(folder)
    source = (folder / "report.tex").read_text(encoding="utf-8")
    begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", source) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended)
    assert source.count(r"\begin{tabular}") == source.count(r"\bottomrule") == source.count(r"\toprule") == 7
    if compiler := shutil.which("pdflatex"):
        command = [compiler, "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        log = (folder / "report.log").read_text(encoding="latin-1")
        assert done.returncode == 0, log[-2000:]
        assert "Overfull" not in log
