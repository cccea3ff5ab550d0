from dataclasses import replace
from pathlib import Path

import pytest
from report.made import counterfactuals, make_results

from bridge_rl.evaluation.results import Comparison, Counterfactual, Estimate, Summary, read_results
from bridge_rl.report import tables
from bridge_rl.report.labels import estimate


def test_estimates_are_written_with_their_intervals():
    assert estimate(Estimate(0.4314, 0.404, 0.4591)) == "0.431 [0.404, 0.459]"
    assert estimate(Estimate(0.5)) == "0.500"
    assert estimate(Estimate(231.44, 220.0, 1520.4)) == "231.4 [220.0, 1,520]"
    assert tables.shorter(Estimate(-0.5, -10.25, 0.25)) == "-.500 [-10.2, .250]"


def test_terminal_table_fits_120_columns_with_the_important_metrics_first():
    text = tables.as_table(make_results((1, 2, 4, 8, 16)).summaries)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split()[:7] == ["condition", "width", "groups", "pass@1", "maj", "all", "any"]
    assert "model                 16  60 x 1  .630 [.600, .660]" in text
    assert len([line for line in lines if line.startswith("shuffled siblings")]) == 4
    left_out = text.partition("also in results.json: ")[2]
    assert "g-pass_0.5" in left_out
    assert "pass@1" not in left_out


def test_terminal_table_of_few_metrics_has_them_all():
    summaries = [Summary("model", 2, 3, 4, {"any": Estimate(1.0), "pass@1": Estimate(0.5, 0.25, 0.75)})]
    assert tables.as_table(summaries) == (
        "condition  width  groups             pass@1    any\n"
        "model          2   3 x 4  .500 [.250, .750]  1.000"
    )  # fmt: skip


def test_markdown_and_latex_escape_what_users_wrote():
    comparison = Comparison("a|b", "pass@1", "runs/x_1 & co", "50 % <b>$y$", Estimate(0.1, 0.05, 0.15), 0.0004, 30)
    table = tables.comparison_table([comparison], "Runs_1")
    markdown = tables.as_markdown(table).splitlines()
    assert markdown[0] == "### Runs_1"
    assert markdown[3] == "| :--- | :--- | :--- | :--- | ---: | ---: | ---: | ---: |"
    assert markdown[4] == (
        r"| a\|b | runs/x\_1 & co | 50 % \<b\>$y$ | pass@1 | 0.100 [0.050, 0.150] | \<0.001 | \<0.001 | 30 |"
    )
    latex = tables.as_latex(table)
    assert r"a|b & runs/x\_1 \& co & 50 \% \textless{}b\textgreater{}\$y\$ & pass@1 &" in latex
    assert r"\caption{Runs\_1}" in latex
    assert r"\begin{tabular}{llllrrrr}" in latex
    assert tables.escape_latex(r"\a^b~{c}#") == r"\textbackslash{}a\textasciicircum{}b\textasciitilde{}\{c\}\#"


def test_p_is_corrected_among_the_comparisons_of_one_metric():
    found = [("pass@1", 0.01), ("maj", 0.04), ("pass@1", 0.03), ("pass@1", 0.02)]
    comparisons = [Comparison("c", metric, "a", "b", Estimate(0.1), p, 30) for metric, p in found]
    # pass@1: .01 x 3, then .02 x 2, then .03 x 1, which is not below the one before.
    assert tables.corrected(comparisons) == pytest.approx([0.03, 0.04, 0.04, 0.04])
    cells = [row[5:7] for row in tables.comparison_table(comparisons).rows]
    assert cells == [["0.010", "0.030"], ["0.040", "0.040"], ["0.030", "0.040"], ["0.020", "0.040"]]


@pytest.mark.parametrize(
    ("over_wrong", "sentence"),
    [
        (Estimate(0.09, 0.03, 0.15), "becomes right .090 more often than beside wrong ones [.030, .150]."),
        (Estimate(-0.09, -0.15, -0.03), "becomes right .090 less often than beside wrong ones [-.150, -.030]."),
        (Estimate(-0.04, -0.12, 0.02), "No difference between right siblings and wrong ones is shown"),
        (Estimate(0.5), "In this one problem a wrong row became right .500 more often"),
    ],
)
def test_what_right_siblings_do_is_said_in_words(over_wrong, sentence):
    nothing = Estimate(0.0, -0.1, 0.1)
    beside_right = Counterfactual("right", 9, nothing, nothing, nothing, over_wrong)
    assert sentence in tables.counterfactual_sentence([beside_right])
    none = replace(beside_right, over_wrong=None)
    assert tables.counterfactual_sentence([none]) == ""
    another = tables.counterfactual_sentence([replace(none, over_other_prompt=over_wrong)])
    assert sentence.replace("wrong ones", "rows of another prompt") in another


def test_results_of_before_do_not_compare_with_another_prompts_and_are_read():
    probes = read_results(Path("studies/small/probes/products.json")).probes
    assert probes.counterfactuals[1].over_other_prompt is None
    assert "another prompt" not in tables.counterfactual_sentence(probes.counterfactuals)
    assert tables.counterfactual_table(probes.counterfactuals).rows[1][5] == ""


def test_right_siblings_are_compared_with_wrong_ones_and_with_another_prompts():
    table = tables.counterfactual_table(counterfactuals())
    [right] = [row for row in table.rows if row[0] == "right rows"]
    assert table.header[4:6] == ["more than beside wrong rows", "more than beside another prompt's"]
    assert right[4:6] == ["0.270 [0.200, 0.340]", "0.310 [0.240, 0.380]"]
    assert tables.counterfactual_sentence(counterfactuals()).endswith(
        "becomes right .310 more often than beside rows of another prompt [.240, .380]."
    )


def test_what_a_table_computed_stands_in_markdown_and_latex():
    [summary, *_] = tables.result_tables(make_results(), ["disabled"])
    note = "95 % intervals over problems. Bridge disabled: the lines of all widths are the same rows, sampled"
    assert note in tables.as_markdown(summary)
    caption = tables.as_latex(summary).splitlines()[2]
    assert caption.startswith(r"\caption{Accuracy by width. In brackets ")
    assert note.replace("%", r"\%") in caption


def test_every_latex_row_has_as_many_cells_as_columns():
    for table in tables.result_tables(make_results()):
        latex = tables.as_latex(table)
        columns = latex.partition(r"\begin{tabular}{")[2].partition("}")[0]
        rows = [line for line in latex.splitlines() if line.endswith(r" \\")]
        assert len(rows) == 1 + len(table.rows)
        assert {row.count(" & ") + 1 for row in rows} == {len(columns)}


def test_tables_stand_only_for_what_was_evaluated():
    titles = [table.title for table in tables.result_tables(make_results())]
    assert titles == [
        "Accuracy by width",
        "All metrics",
        "Controls and comparisons",
        "One answer a problem, by cost",
        "Accuracy by length",
        "A wrong row with other siblings",
    ]
    bare = tables.result_tables(type(make_results())({}, make_results().summaries))
    assert [table.title for table in bare] == titles[:2]
