import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from report.made import make_results

from bridge_rl.evaluation.results import Estimate, LengthPoint, Summary
from bridge_rl.report.drawing import COLOURS, RAMP, arms_of, as_svg
from bridge_rl.report.plots import (
    HELD_OUT,
    KL,
    attention_figure,
    draw,
    lengths_figure,
    plot_widths,
    training_curves,
    training_figure,
    widths_figure,
)


def read_history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_figures_are_drawn_for_what_there_is(run):
    results = make_results()
    whole = ["widths", "g_pass", "controls", "lengths", "training", "norm_ratio", "attention"]
    assert list(draw(results, read_history(run))) == whole
    only_model = [s for s in results.summaries if s.condition == "model"]
    bare = replace(results, summaries=only_model, lengths=[], probes=None)
    assert list(draw(bare)) == ["widths", "g_pass"]


def test_lines_and_bars_show_values_and_intervals():
    summaries = [
        Summary("model", 4, 9, 2, {"pass@1": Estimate(0.5, 0.4, 0.7)}),
        Summary("model", 1, 9, 8, {"pass@1": Estimate(0.25)}),
    ]
    [axis] = widths_figure({"arm": summaries}).axes
    line, *_ = axis.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.25], [4, 0.5]])
    [bars] = [collection.get_segments() for collection in axis.collections]
    np.testing.assert_allclose(bars, [[[1, 0.25], [1, 0.25]], [[4, 0.4], [4, 0.7]]])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "4"]
    assert axis.get_ylim()[0] == 0
    np.testing.assert_allclose(arms_of([Estimate(0.5, 0.4, 0.7), Estimate(0.25)]), [[0.1, 0.0], [0.2, 0.0]])


def test_controls_stand_beside_the_model_at_each_width():
    axis = draw(make_results((1, 4)))["controls"].axes[0]
    assert sorted(round(bar.get_height(), 2) for bar in axis.patches) == [0.36, 0.37, 0.43, 0.53]
    assert len({bar.get_hatch() for bar in axis.patches}) == 3  # told apart in print too


def test_trained_length_is_marked():
    lengths = make_results().lengths
    for axis in lengths_figure(lengths, 256).axes:
        assert [256, 256] in [list(line.get_xdata()) for line in axis.get_lines()]
    for axis in lengths_figure(lengths, None).axes:
        assert "limit in training" not in [line.get_label() for line in axis.get_lines()]


def test_lengths_show_the_model_at_every_width_and_controls_at_the_trained_one():
    points = [
        LengthPoint(condition, width, limit, Estimate(0.1 * width), 0.5)
        for condition, widths in {"disabled": (1, 2, 4), "model": (1, 2, 4), "shuffled": (2, 4)}.items()
        for width in widths
        for limit in (8, 16)
    ]
    controls = {2: ["shuffled siblings, width 2", "Bridge disabled, width 2"]}
    controls[8] = ["shuffled siblings, width 4", "Bridge disabled, width 4"]  # not evaluated: the largest
    for trained, named in controls.items():
        figure = lengths_figure(points, 16, trained)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == ["model, width 1", "model, width 2", "model, width 4", *named, "limit in training"]
        lines = [container.lines[0] for container in figure.axes[0].containers]
        assert len({line.get_color() for line in lines}) == len(lines) == 5


def test_training_curves_do_not_blow_up_noise():
    steps = (10, 20)
    curves = {
        "reward": {"reward": [(10, 0.5), (20, 0.52)]},
        "share of rows cut": {"rollout/truncated": [(10, 0.0), (20, 0.004)]},
        "completion length, tokens": {"completions/mean_length": [(10, 25.0), (20, 25.03)]},
        "penalty": {"penalty": [(10, -0.5), (20, -0.51)]},
        KL: {"rollout/recompute_kl": [(step, -1e-9) for step in steps]},
        HELD_OUT: {f"eval_pass@1/w{width}": [(20, 0.4)] for width in (1, 2, 4)},
    }
    figure = training_figure(curves)
    reward, cut, length, penalty, kl, held_out = figure.axes
    assert reward.get_ylim() == pytest.approx((0, 0.5616))
    assert cut.get_ylim() == (0, 0.1)
    assert length.get_ylim()[0] == 0
    assert penalty.get_ylim() == pytest.approx((-0.555, -0.455))
    assert kl.get_ylim() == pytest.approx((-1e-5, 1e-5))
    assert "near 0 unless broken" in kl.get_title()
    assert len({float(line.get_xdata()[0]) for line in held_out.get_lines()}) == 3  # none hides another
    figure.draw_without_rendering()
    for axis in figure.axes:
        box = axis.title.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


def test_attention_is_shown_about_even_attention():
    probes = make_results().probes
    assert probes is not None
    near = replace(probes, width=4, sibling_share=[[0.76, 0.74]], share_by_step=[[0.75, float("nan")]], layers=[3])
    for image in [axis.images[0] for axis in attention_figure(near).axes[:2]]:
        assert image.get_clim() == pytest.approx((0.65, 0.85))
    far = replace(near, sibling_share=[[0.35, 0.74]])
    assert attention_figure(far).axes[0].images[0].get_clim() == pytest.approx((0.35, 1.15))


def test_blocks_that_do_not_attend_have_no_figure_of_attention():
    results = make_results()
    assert results.probes is not None
    probes = replace(results.probes, sibling_share=[], share_by_step=[])
    assert "attention" not in draw(replace(results, probes=probes))
    assert attention_figure(probes).axes == []


def test_a_panel_of_mixed_groups_says_why_widths_are_missing():
    own, mixed = draw(make_results((1, 4, 8)))["g_pass"].axes
    assert mixed.get_xlabel().endswith("fewer than w groups a problem at width 8")
    assert "fewer" not in own.get_xlabel()
    assert own.get_ylim() == mixed.get_ylim()


def test_heat_maps_show_layers_by_heads_and_by_steps():
    probes = make_results().probes
    assert probes is not None
    axes = draw(make_results())["attention"].axes
    np.testing.assert_allclose(axes[0].images[0].get_array(), probes.sibling_share)
    np.testing.assert_allclose(axes[1].images[0].get_array(), probes.share_by_step)


def test_training_curves_take_numbers_only_and_order_widths_by_number():
    history = [
        {"step": 5, "reward": 0.25, "eval_pass@1/w16": 0.5, "eval_pass@1/w2": 0.4},
        {"step": 10, "reward": float("nan")},
        {"step": 15, "reward": "0.5", "runtime": 3.0},
        {"step": 20, "reward": 0.75},
    ]
    curves = training_curves(history)
    assert curves["reward"] == {"reward": [(5, 0.25), (20, 0.75)]}
    assert list(curves["held-out pass@1, by width"]) == ["eval_pass@1/w2", "eval_pass@1/w16"]
    assert set(curves) == {"reward", "held-out pass@1, by width"}
    assert training_curves([]) == {}


@pytest.mark.parametrize("name", ["a $b", "$x_1$ & <i>", "_hidden"])
def test_names_of_arms_are_shown_as_they_are(name, tmp_path):
    figure = widths_figure({name: make_results().summaries[:4], "other": make_results().summaries[:4]})
    text = "".join(ElementTree.fromstring(as_svg(figure, "widths", "d")).itertext())
    assert name in text.replace("\\", "")
    plot_widths({name: make_results().summaries[:4]}, tmp_path / "new" / "widths.png")
    with Image.open(tmp_path / "new" / "widths.png") as image:
        assert image.width > 1500


def test_svg_is_whole_follows_the_page_and_refers_to_nothing_outside(run):
    again = draw(make_results(), read_history(run))
    for name, figure in draw(make_results(), read_history(run)).items():
        text = as_svg(figure, name, 'say "this"')
        svg = ElementTree.fromstring(text)
        assert svg.get("aria-label") == 'say "this"'
        ids = [element.get("id") for element in svg.iter() if element.get("id")]
        assert all(identity.startswith(f"{name}-") for identity in ids)
        links = [v for element in svg.iter() for key, v in element.attrib.items() if key.endswith("href")]
        assert all(link.startswith((f"#{name}-", "data:image/png;base64,")) for link in links)
        assert {link[1:] for link in links if link[0] == "#"} <= set(ids)
        assert not any(colour in text for colour in (*COLOURS, *RAMP))
        assert "var(--ink)" in text
        assert as_svg(again[name], name, 'say "this"') == text
