"""Results as tables: for a terminal, Markdown, LaTeX; pages render the same `Table`."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bridge_rl.evaluation.intervals import holm
from bridge_rl.evaluation.results import (
    Aggregated,
    Comparison,
    Counterfactual,
    Estimate,
    LengthPoint,
    Results,
    Summary,
)
from bridge_rl.report.labels import (
    CONDITIONS,
    METRICS,
    SIBLINGS,
    estimate,
    number,
    ordered_metrics,
    p_value,
    shorter,
)

TERMINAL_COLUMNS = 120
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Table:
    """Cells as text. text_columns: how many at the left are words, not figures. note: a sentence below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1
    note: str = ""


# -- what stands in them --------------------------------------------------------------------------------------------


def summary_table(summaries: Sequence[Summary]) -> Table:
    """One row a condition and width, with the important metrics that are there."""
    shown = [name for name in ordered_metrics(summaries) if name in METRICS]
    rows = [
        [
            CONDITIONS[summary.condition],
            str(summary.width),
            str(summary.problems),
            str(summary.groups_per_problem),
            *(estimate(summary.metrics[name]) if name in summary.metrics else "-" for name in shown),
        ]
        for summary in summaries
    ]
    return Table("Accuracy by width", ["condition", "width", "problems", "groups each", *shown], rows)


def metric_table(summaries: Sequence[Summary]) -> Table:
    """Every metric: one row a metric, one column a condition and width."""
    header = ["metric", *(f"{CONDITIONS[summary.condition]}, w={summary.width}" for summary in summaries)]
    rows = [
        [name, *(estimate(summary.metrics[name]) if name in summary.metrics else "-" for summary in summaries)]
        for name in ordered_metrics(summaries)
    ]
    return Table("All metrics", header, rows)


def comparison_table(comparisons: Sequence[Comparison], title: str = "Controls and comparisons") -> Table:
    """p as it is, and corrected for the number of comparisons of one metric, which ask one question."""
    header = ["comparison", "first", "second", "metric", "difference", "p, uncorrected", "p, Holm", "problems"]
    rows = [
        [c.name, c.first, c.second, c.metric, estimate(c.difference), p_value(c.p), p_value(p), str(c.problems)]
        for c, p in zip(comparisons, corrected(comparisons), strict=True)
    ]
    return Table(title, header, rows, text_columns=4)


def corrected(comparisons: Sequence[Comparison]) -> list[float]:
    """Holm's p of each among those of its metric: of siblings pass@1, of coverage any, of votes maj."""
    found = [comparison.p for comparison in comparisons]
    for metric in {comparison.metric for comparison in comparisons}:
        places = [place for place, comparison in enumerate(comparisons) if comparison.metric == metric]
        for place, p in zip(places, holm([found[place] for place in places]), strict=True):
            found[place] = p
    return found


def aggregated_table(aggregated: Sequence[Aggregated]) -> Table:
    header = ["method", "condition", "width", "samples", "tokens a problem", "accuracy"]
    rows = [
        [a.method, CONDITIONS[a.condition], str(a.width), str(a.samples), number(a.tokens), estimate(a.accuracy)]
        for a in aggregated
    ]
    return Table("One answer a problem, by cost", header, rows, text_columns=2)


def length_table(lengths: Sequence[LengthPoint]) -> Table:
    header = ["condition", "width", "limit in tokens", "accuracy", "share of rows cut"]
    rows = [
        [CONDITIONS[p.condition], str(p.width), str(p.limit), estimate(p.accuracy), number(p.truncated)]
        for p in lengths
    ]
    return Table("Accuracy by length", header, rows)


def counterfactual_table(counterfactuals: Sequence[Counterfactual]) -> Table:
    header = [
        "a wrong row beside",
        "rows",
        "answer changes",
        "becomes right",
        "more than beside wrong rows",
        "more than beside another prompt's",
        "change of its log-prob, nats a token",
    ]
    rows = [
        [
            SIBLINGS[c.siblings],
            str(c.rows),
            estimate(c.changed),
            estimate(c.became_right),
            *("" if more is None else estimate(more) for more in (c.over_wrong, c.over_other_prompt)),
            estimate(c.logprob),
        ]
        for c in counterfactuals
    ]
    note = (
        "Rows of another prompt disturb a row. Wrong rows of its own may hold it at its answer, so look at how many "
        "answers change beside each before taking what is more than beside them for what right rows tell."
    )
    return Table("A wrong row with other siblings", header, rows, note=note)


def counterfactual_sentence(counterfactuals: Sequence[Counterfactual]) -> str:
    """Whether right siblings put wrong rows right, more than wrong ones and another prompt's do.

    A sentence each; empty where that was not measured.
    """
    found = [
        (more, words)
        for c in counterfactuals
        if c.siblings == "right"
        for more, words in ((c.over_wrong, "wrong ones"), (c.over_other_prompt, "rows of another prompt"))
    ]
    return " ".join(more_often_sentence(more, words) for more, words in found if more is not None)


def more_often_sentence(more: Estimate, others: str) -> str:
    size, way = shorter(Estimate(abs(more.value))), "more" if more.value >= 0 else "less"
    if more.low is None or more.high is None:
        return f"In this one problem a wrong row became right {size} {way} often beside right siblings than {others}."
    ends = f"[{shorter(Estimate(more.low))}, {shorter(Estimate(more.high))}]"
    if more.low > 0 or more.high < 0:
        return f"Beside right siblings a wrong row becomes right {size} {way} often than beside {others} {ends}."
    return (
        f"No difference between right siblings and {others} is shown: how much more often a wrong row becomes right "
        f"beside right siblings is {shorter(Estimate(more.value))} {ends}."
    )


def regrouped_note(regrouped: Sequence[str]) -> str:
    """What lines of rows that were sampled one by one are; empty where there are none (`viewer.regrouped`)."""
    if not regrouped:
        return ""
    who = "Rows of this model do not hear each other" if "model" in regrouped else "Bridge disabled"
    return f"{who}: the lines of all widths are the same rows, sampled one by one and regrouped."


def result_tables(results: Results, regrouped: Sequence[str] = ()) -> list[Table]:
    """Every table for which there is something to say, in the order of a report. regrouped: see `viewer.regrouped`."""
    note = f"In brackets 95 % intervals over problems. {regrouped_note(regrouped)}".rstrip()
    summary = replace(summary_table(results.summaries), note=note)
    tables = [summary, metric_table(results.summaries)]
    if results.comparisons:
        tables.append(comparison_table(results.comparisons))
    if results.aggregated:
        tables.append(aggregated_table(results.aggregated))
    if results.lengths:
        tables.append(length_table(results.lengths))
    if results.probes is not None and results.probes.counterfactuals:
        tables.append(counterfactual_table(results.probes.counterfactuals))
    return tables


# -- how they are written -------------------------------------------------------------------------------------------


def as_table(summaries: Sequence[Summary]) -> str:
    """For a terminal: as many of the metrics as 120 columns hold, the important ones first; names the others."""
    metrics = ordered_metrics(summaries)
    shown = len(metrics)
    while shown > 1 and text_width(terminal_table(summaries, metrics[:shown])) > TERMINAL_COLUMNS:
        shown -= 1
    lines = [as_text(terminal_table(summaries, metrics[:shown]))]
    if shown < len(metrics):
        also = f"also in results.json: {', '.join(metrics[shown:])}"
        lines += textwrap.wrap(also, TERMINAL_COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def terminal_table(summaries: Sequence[Summary], metrics: Sequence[str]) -> Table:
    """Like `summary_table`, narrower: `problems x groups` in one column, `.431 [.404, .459]`."""
    rows = [
        [
            CONDITIONS[summary.condition],
            str(summary.width),
            f"{summary.problems} x {summary.groups_per_problem}",
            *(shorter(summary.metrics[name]) if name in summary.metrics else "-" for name in metrics),
        ]
        for summary in summaries
    ]
    return Table("", ["condition", "width", "groups", *metrics], rows)


def as_text(table: Table) -> str:
    """Columns of equal width, words to the left and figures to the right."""
    widths = column_widths(table)
    lines = []
    for row in [table.header, *table.rows]:
        cells = [
            cell.ljust(width) if place < table.text_columns else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def column_widths(table: Table) -> list[int]:
    return [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]


def text_width(table: Table) -> int:
    return sum(column_widths(table)) + 2 * (len(table.header) - 1)


def as_markdown(table: Table) -> str:
    """A pipe table under its title."""
    rule = [":---" if place < table.text_columns else "---:" for place in range(len(table.header))]
    rows = [[escape_markdown(cell) for cell in row] for row in [table.header, *table.rows]]
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]]]
    note = f"\n{escape_markdown(table.note)}\n" if table.note else ""
    return f"### {table.title}\n\n" + "\n".join(lines) + "\n" + note


def escape_markdown(text: str) -> str:
    for character in "\\|*_<>`":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def as_latex(table: Table) -> str:
    """A `table` float for the booktabs package; wide ones want `\\resizebox` or a landscape page."""
    caption = f"{table.title}. {table.note}" if table.note else table.title
    columns = "l" * table.text_columns + "r" * (len(table.header) - table.text_columns)
    header, *rows = [" & ".join(map(escape_latex, row)) + r" \\" for row in [table.header, *table.rows]]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        header,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
