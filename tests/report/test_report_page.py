import json
import random
import re
from dataclasses import replace

import pytest
from report.made import HOSTILE, WORDS, make_evaluation, make_group, make_results, make_run
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from bridge_rl.evaluation.analyse import analyse
from bridge_rl.evaluation.results import Aggregated, Estimate, Results, write_results
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.report.command import write_report
from bridge_rl.report.html import QUESTIONS, g_pass_caption, headline

SECTIONS = ["widths", "controls", "cost", "lengths", "training", "probes", "groups", "made"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = make_evaluation(tmp_path_factory.mktemp("page"))
    return write_report(directory, make_run(tmp_path_factory.mktemp("run")))[0]


@pytest.fixture(scope="module")
def samples(page):
    return {group.key: group for group in SampleStore(page.parent / "samples").read()}


def text_of(browser, identity):
    return browser.find_element(By.ID, identity).text


def place(browser):
    """Where the viewer is, from what it shows: condition, width, problem, group."""
    parts = ("condition", "width", "problem", "group")
    return tuple(browser.find_element(By.ID, f"choose-{part}").get_attribute("value") for part in parts)


def group_at(samples, key):
    condition, width, problem, group = key
    return samples[condition, int(width), int(problem), int(group)]


def press(browser, key):
    browser.find_element(By.ID, "viewer").send_keys(key)


def choose(browser, part, value):
    Select(browser.find_element(By.ID, f"choose-{part}")).select_by_value(value)


def scroll_to_end(browser, steps):
    """Wait until the last of so many steps is drawn."""
    browser.execute_script("document.getElementById('viewer').scrollTop = 1e9")
    last = "return [...document.querySelectorAll('.step .at')].at(-1).textContent"
    WebDriverWait(browser, 10).until(lambda _: browser.execute_script(last) == str(steps))


def sections(browser):
    return [section.get_attribute("id") for section in browser.find_elements(By.CSS_SELECTOR, "section[id]")]


def test_every_section_is_there_and_nothing_that_a_model_wrote_runs(open_page, page):
    browser = open_page(page)
    assert [
        section.get_attribute("id") for section in browser.find_elements(By.CSS_SELECTOR, "section[id]")
    ] == SECTIONS
    links = [link.get_attribute("href").partition("#")[2] for link in browser.find_elements(By.CSS_SELECTOR, "nav a")]
    assert links == SECTIONS
    assert len(browser.find_elements(By.CSS_SELECTOR, "svg.figure")) == 7
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements(By.CSS_SELECTOR, "main img, h1 b") == []
    assert browser.find_element(By.TAG_NAME, "h1").text == "runs/demo_$x_1 on math & <b>more</b>"
    assert HOSTILE in text_of(browser, "problem-text")


def test_one_sentence_leads_and_every_verdict_follows_by_question(open_page, page):
    browser = open_page(page)
    verdicts = browser.find_element(By.CLASS_NAME, "verdicts")
    assert verdicts.text.split("\n") == [  # of width 8: there is no verdict of the trained one
        "At width 8 siblings help: pass@1 .580 against .370 with shuffled siblings, .430 at width 1; coverage fell.",
        "Every verdict, by question",
    ]
    verdicts.find_element(By.TAG_NAME, "summary").click()
    texts = verdicts.text.split("\n")
    assert [text for text in texts if text in QUESTIONS.values()] == list(QUESTIONS.values())
    starts = [" ".join(text.split()[:4]) for text in texts[2:] if text not in QUESTIONS.values()]
    assert starts == [
        "At width 2 no",
        "At width 8 siblings",
        "At width 8 coverage",
        "At width 8 the",
        "p values are corrected",
        "Mean accuracy (pass@1) is",
    ]
    assert texts[-1].endswith("0.430 [0.400, 0.460] at width 1 and 0.580 [0.550, 0.610] at width 8, over 20 problems.")


def test_the_verdict_at_the_trained_width_leads():
    results = make_results()
    lead = headline(replace(results, meta={"trained_width": 2})).lead
    assert (
        lead
        == "At width 2 no difference between rows together and alone was found: pass@1 .480 against .430 at width 1."
    )
    assert headline(replace(results, meta={})).lead.startswith("At width 8 siblings help")


def test_a_page_of_a_model_without_a_bridge_speaks_of_no_siblings(open_page, tmp_path):
    directory = make_evaluation(tmp_path / "eval", widths=(1, 2), problems=4)
    both = [
        Aggregated("majority", "model", width, samples, 9.0, Estimate(0.5))
        for width, samples in [(1, 1), (2, 2), (1, 2)]
    ]
    for path in (directory / "samples").iterdir():
        path.unlink()
    rng = random.Random(0)
    alone = [make_group(rng, "model", 1, problem, number, 9) for problem in range(4) for number in range(2)]
    SampleStore(directory / "samples").append(alone)
    results = analyse(alone, (1, 2), listening=False, meta=make_results().meta)
    write_results(replace(results, aggregated=both), directory / "results.json")
    browser = open_page(write_report(directory)[0])
    assert "Rows of this model do not hear each other" in browser.find_element(By.CLASS_NAME, "verdicts").text
    widths = browser.find_element(By.ID, "widths")
    assert "the lines of all widths are the same rows, sampled one by one and regrouped." in widths.text
    assert "regrouped" in (directory / "table.md").read_text()
    assert "which hear each other" not in widths.text
    cost = browser.find_elements(By.CSS_SELECTOR, "#cost tbody tr")
    assert [row.text.split()[:4] for row in cost] == [["majority", "model", "1", "1"], ["majority", "model", "1", "2"]]


def test_the_caption_of_g_pass_describes_what_is_there():
    summaries = make_results((1, 2)).summaries
    assert "which hear each other; and of w rows, one from each of w groups, which do not" in g_pass_caption(
        summaries, True
    )
    plain = [replace(s, metrics={n: v for n, v in s.metrics.items() if "mixed" not in n}) for s in summaries]
    assert g_pass_caption(plain, False).endswith("is right of the w rows of a group.")


def test_counterfactuals_are_put_in_words(open_page, page):
    text = open_page(page).find_element(By.ID, "probes").text
    assert (
        "Beside right siblings a wrong row becomes right .270 more often than beside wrong ones [.200, .340]." in text
    )
    assert "more often than beside rows of another prompt [.240, .380]." in text


def test_a_page_of_bare_results_says_what_it_cannot_show(open_page, tmp_path):
    results = make_results()
    bare = Results(results.meta, [summary for summary in results.summaries if summary.condition == "model"])
    write_results(bare, tmp_path / "results.json")
    browser = open_page(write_report(tmp_path)[0])
    assert sections(browser) == ["widths", "made"]
    assert "There are no controls" in browser.find_element(By.CLASS_NAME, "verdicts").text


def test_rows_stand_side_by_side_token_by_token(open_page, page, samples):
    browser = open_page(page)
    key = place(browser)
    group = group_at(samples, key)
    browser = open_page(page, f"#{'/'.join(key)}")
    assert place(browser) == key
    heads = [head.text.split("\n") for head in browser.find_elements(By.CLASS_NAME, "head")]
    assert [head[0].split()[-1] for head in heads] == ["right" if right else "wrong" for right in group.correct]
    assert [head[1] for head in heads] == [
        "no answer" if answer is None else f"answer {answer}" for answer in group.answers
    ]
    ends = ["EOS" if reason == "stop" else "cut at the limit" for reason in group.finish_reasons]
    assert [head[2].split(" · ")[0] for head in heads] == [
        f"{len(row)} tokens, {end}" for row, end in zip(group.tokens, ends, strict=True)
    ]
    lines = browser.find_elements(By.CLASS_NAME, "step")
    for step in (0, 7):
        cells = lines[step].find_elements(By.CLASS_NAME, "token")
        pieces = [json.loads(cell.get_attribute("title")) for cell in cells]
        assert pieces == [WORDS[row[step]] for row in group.tokens]
    assert [line.rect["y"] - lines[0].rect["y"] for line in lines[:9]] == [20 * step for step in range(9)]


def test_ends_of_rows_are_shown(open_page, page, samples):
    browser = open_page(page)
    choose(browser, "width", "8")
    while len(set(group_at(samples, place(browser)).finish_reasons)) == 1:
        press(browser, Keys.ARROW_RIGHT)
    group = group_at(samples, place(browser))
    scroll_to_end(browser, 48 + 1)  # the row that was cut has 48 tokens
    lines = {int(line.text.split("\n")[0]): line for line in browser.find_elements(By.CLASS_NAME, "step")}
    for row, (tokens, reason) in enumerate(zip(group.tokens, group.finish_reasons, strict=True)):
        last, after = (
            lines[step].find_elements(By.CLASS_NAME, "token")[row] for step in (len(tokens), len(tokens) + 1)
        )
        assert last.text.startswith("<eos> ■") == (reason == "stop")
        assert after.get_attribute("class") == ("token after" if reason == "stop" else "token end cut")
        assert after.text == ("" if reason == "stop" else "✂ cut at the limit")


def test_arrow_keys_move_between_groups_and_the_address_follows(open_page, page):
    browser = open_page(page)
    first = place(browser)
    assert first[:2] == ("model", "4")  # the trained width
    press(browser, Keys.ARROW_RIGHT)
    second = place(browser)
    assert second != first
    assert browser.current_url.partition("#")[2] == "/".join(second)
    press(browser, Keys.ARROW_LEFT)
    assert place(browser) == first
    number, total = map(int, text_of(browser, "place").split(" / "))
    for _ in range(number + 1):
        press(browser, Keys.ARROW_LEFT)
    assert text_of(browser, "place") == f"1 / {total}"  # and not before the first


def test_choosing_and_filtering(open_page, page, samples):
    browser = open_page(page)
    choose(browser, "condition", "shuffled")
    choose(browser, "width", "8")
    assert place(browser)[:2] == ("shuffled", "8")
    assert len(browser.find_elements(By.CLASS_NAME, "head")) == 8
    choose(browser, "condition", "model")
    choose(browser, "width", "1")  # never mixed
    total = int(text_of(browser, "place").split(" / ")[1])
    browser.find_element(By.ID, "only-mixed").click()
    assert int(text_of(browser, "place").split(" / ")[1]) < total
    for _ in range(5):
        correct = group_at(samples, place(browser)).correct
        assert any(correct)
        assert not all(correct)
        press(browser, Keys.ARROW_RIGHT)


def test_hovering_marks_a_step_across_the_rows(open_page, page):
    from selenium.webdriver import ActionChains

    browser = open_page(page)
    line = browser.find_elements(By.CLASS_NAME, "step")[3]
    before = line.value_of_css_property("background-color")
    ActionChains(browser).move_to_element(line.find_elements(By.CLASS_NAME, "token")[1]).perform()
    assert line.value_of_css_property("background-color") != before


def test_whole_texts_can_be_read(open_page, page, samples):
    browser = open_page(page)
    browser.find_element(By.ID, "as-text").click()
    texts = [cell.get_attribute("textContent") for cell in browser.find_elements(By.CLASS_NAME, "whole")]
    shown = group_at(samples, place(browser))
    assert texts == shown.completions
    assert browser.execute_script("return window.hacked") is None


def test_thousands_of_steps_stay_usable(open_page, tmp_path):
    rng = random.Random(0)
    directory = make_evaluation(tmp_path / "eval", widths=(16,), problems=2)
    others = [group for group in SampleStore(directory / "samples").read() if group.condition != "model"]
    for path in (directory / "samples").iterdir():
        path.unlink()
    long = [make_group(rng, "model", 16, problem, 0, 8192) for problem in range(2)]
    SampleStore(directory / "samples").append([*long, *others])
    browser = open_page(write_report(directory)[0])
    assert len(browser.find_elements(By.CLASS_NAME, "step")) < 120
    steps = max(
        len(row) + (reason == "length") for row, reason in zip(long[0].tokens, long[0].finish_reasons, strict=True)
    )
    scroll_to_end(browser, steps)
    assert len(browser.find_elements(By.CLASS_NAME, "step")) < 120
    assert browser.execute_script("return performance.now()") < 20_000


TEXT_COLOURS = """
const where = "body, td, svg.figure text, .token:not(.after), .head b, .head .end, .verdicts p";
const texts = document.querySelectorAll(where);
return [...new Set([...texts].map((e) => getComputedStyle(e)[e.tagName === "text" ? "fill" : "color"]))];
"""


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window_and_follows_the_colour_scheme(open_page, page, width, scheme):
    browser = open_page(page)
    emulate(browser, {"name": "prefers-color-scheme", "value": scheme})
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    back = luminance(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
    assert back > 0.9 if scheme == "light" else back < 0.05
    colours = browser.execute_script(TEXT_COLOURS)
    assert len(colours) > 3
    for colour in colours:
        bright, dark = sorted((luminance(colour), back), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 4.5, colour  # what WCAG asks of text
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    emulate(browser)


def emulate(browser, *features):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": list(features)})


def luminance(colour):
    """Relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
