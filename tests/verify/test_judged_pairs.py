r"""(gold, prediction, verdict): the conventions of math answers, and what is known to be judged otherwise.

Predictions are the content of a box, except in IN_PROSE.
"""

import pytest

from bridge_rl.verify import gold_parses, verify_answers

RIGHT = [
    # numbers
    ("42", "42"),
    ("42", "42.0"),
    ("-3", "\N{MINUS SIGN}3"),
    ("1000", "1,000"),
    ("10000", r"10\,000"),
    ("1234567", "1,234,567"),
    ("11111", r"11,\! 111"),
    ("1000", "1e3"),
    ("1e-8", "0.00000001"),
    ("1500", r"1.5 \times 10^3"),
    ("10^{-8}", "0.00000001"),
    (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"\frac{1}{3}", "0.333333"),
    (r"\frac{3}{4}", "6/8"),
    ("0.75", r"\frac34"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    (r"1\frac{1}{2}", "1.5"),
    (r"\frac{7}{2}", r"3\frac{1}{2}"),
    ("5/2", "2 1/2"),
    # short words
    ("YES", "Yes"),
    ("yes", r"\text{Yes.}"),
    ("-2.5", r"-2\,1/2"),
    ("2 1/2", "2.5"),
    ("2 1/2", r"2\frac{1}{2}"),
    ("101_2", "101_2"),
    ("8", "2^3"),
    ("120", "5!"),
    ("10", r"\binom{5}{2}"),
    ("007", "7"),
    # powers, as programs and keyboards write them
    ("x^2", "x**2"),
    ("0.001", "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT THREE}"),
    ("x^{-1}", "x\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT ONE}"),
    ("5", "5\N{ZERO WIDTH SPACE}"),
    ("5", "\N{ZERO WIDTH NO-BREAK SPACE}5"),
    (r"2\pi", "2pi"),
    (r"2\pi", "2*pi"),
    (r"2\pi", "2 pi"),
    (r"\frac{\pi}{2}", "pi/2"),
    # several solutions
    ("1,2", r"x=1\\x=2"),
    ("1,2", r"x=1 \quad x=2"),
    ("5", r"x=5 \quad \text{cm}"),
    # percentages, money, units
    (r"12.5\%", "12.5"),
    ("12.5", r"12.5\%"),
    (r"12.5\%", "0.125"),
    (r"12.5\%", r"\frac{25}{2}"),
    ("20", r"20.0\%"),
    ("7.5", "7.5%"),
    (r"\frac{200}{3}\%", r"\frac{2}{3}"),
    (r"50\%", "0.5"),
    (r"50\%", "50"),
    ("5", r"\$5"),
    ("5", r"5\text{ cm}"),
    ("90", r"90^\circ"),
    ("90", "90\N{DEGREE SIGN}"),
    ("90\N{DEGREE SIGN}", "90"),
    ("x^2+1", "x\N{SUPERSCRIPT TWO} + 1"),
    ("8x^3", "(2x)\N{SUPERSCRIPT THREE}"),
    ("2^{32}", "2\N{SUPERSCRIPT THREE}\N{SUPERSCRIPT TWO}"),
    ("1/2", "\N{VULGAR FRACTION ONE HALF}"),
    ("5/2", "2\N{VULGAR FRACTION ONE HALF}"),
    (r"\frac{x}{3}", "\N{VULGAR FRACTION ONE THIRD}x"),
    ("2/3", "2\N{FRACTION SLASH}3"),
    (r"3\sqrt{2}", "3\N{SQUARE ROOT}2"),
    (r"\sqrt{x+1}", "\N{SQUARE ROOT}(x+1)"),
    (r"\frac{\sqrt{3}}{2}", "\N{SQUARE ROOT}{3}/2"),
    ("12", "12 square units"),
    ("60", r"60 \text{ miles per hour}"),
    ("36", "36 cm^2"),
    ("36", r"36\,cm^{2}"),
    ("36", "36 cm\N{SUPERSCRIPT TWO}"),
    (r"12\pi", r"12\pi\ cm^3"),
    (r"\sqrt{3}", r"\sqrt{3}\;cm^2"),
    ("5", "5 km/h"),
    ("10", "10 mL"),
    ("6", "\N{EURO SIGN}6"),
    ("12", "12 times"),
    ("3", "3 more apples"),
    (r"50\%", r"50\text{ percent}"),
    ("5", r"\text{score}=5"),
    (r"5\text{ million}", "5 million"),
    (r"\$5\text{ million}", r"5\text{ million dollars}"),
    (r"3\text{ dozens}", r"3\,\text{dozen}"),
    # surds, pi, powers, logarithms
    (r"2\sqrt{3}", r"2\sqrt{3}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{1}{2}\sqrt 3"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    (r"16\pi", "16\N{GREEK SMALL LETTER PI}"),
    (r"\log_2 8", "3"),
    ("2^{10}", "1024"),
    (r"e^{2}", r"\exp(2)"),
    # expressions
    ("x^2+2x+1", "(x+1)^2"),
    ("x^2+1", "1+x^2"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"\cot x", r"\frac{1}{\tan x}"),
    ("|x|", r"\sqrt{x^2}"),
    (r"\frac{x}{y}", "x/y"),
    ("2(x+y)", "2x+2y"),
    ("3+4i", "4i+3"),
    ("f(x)=x+1", "x+1"),
    # equations
    ("5", "x=5"),
    ("x=5", "5"),
    ("y=2x+1", "y=1+2x"),
    ("2x+1", "y=2x+1"),
    ("5", "2+3=5"),
    ("1.414", r"\sqrt{2}=1.414"),
    ("5", "= 5"),
    ("3.14", r"\approx 3.14"),
    ("3.14", "\N{ALMOST EQUAL TO}3.14"),
    ("2,3", "x\N{SUBSCRIPT ONE}=2, x\N{SUBSCRIPT TWO}=3"),
    ("x+y=1", "y+x=1"),
    (r"x=1 \text{ or } x=2", "1, 2"),
    # tuples, sets, intervals, matrices
    ("(3,4)", r"\left( 3, 4 \right)"),
    ("(4,3)", "(4,3)"),
    ("1,2", "2,1"),
    ("1,2", r"\{1,2\}"),
    (r"\{1,2\}", r"1 \text{ and } 2"),
    (r"(\frac12, 3)", "(0.5,3)"),
    ("(1,2,3)", "(1, 2, 3)"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\varnothing", r"\emptyset"),
    (r"\emptyset", r"\varnothing"),
    (r"\emptyset", r"\{\}"),
    (r"(3,\infty)", "x>3"),
    ("x>3", "(3,oo)"),
    ("(3,oo)", "x>3"),
    ("[1,2]", r"1\le x\le 2"),
    ("[1,2]", r"x \in [1,2]"),
    ("[1,2]", "x\N{ELEMENT OF}[1,2]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\infty", "oo"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ("x>3", "3<x"),
    (r"x \ge 3", r"3 \leq x"),
    # words and choices
    ("Monday", r"\text{Monday}"),
    (r"\text{even}", "Even"),
    ("no solution", r"\text{No Solution}"),
    ("A", "(A)"),
    ("A", r"\text{(A)}"),
    (r"\text{(B)}", "B"),
    ("12:30", "12:30"),
    ("5,6", r"x=5 \lor x=6"),
    (r"x=5 \vee x=6", r"x=6 \vee x=5"),
    ("x=5,y=6", r"x=5 \land y=6"),
    ("a,b", "b,a"),
    ("1,2,2", "2,1,2"),
    ("1,2", "2, 1.0"),
    ("1,2", r"1\text{ and }2"),
    # units
    ("5", "5 cm"),
    ("5", "5cm"),
    ("5", r"5\;\text{m}/\text{s}^2"),
    ("5", r"5\text{ m}\cdot\text{s}^{-1}"),
    ("5", r"\text{5 cm}"),
    ("5", r"5\text{ cm}^2"),
    (r"5\text{ cm}", "5"),
    (r"2\sqrt{3}\text{ cm}", r"\sqrt{12}"),
    ("2", "2 hrs"),
    (r"\frac34", r"\frac{3}{4} inches"),
    (r"9\pi", r"9\pi square units"),
    ("7", r"7\ meters"),
    ("7", r"\$7 per hour"),
    (r"20\%", r"20\%\text{ increase}"),
    (r"20\%", r"20\% increase"),
    ("5", r"|5|\text{ cm}"),
    ("30", r"30^{\degree}"),
    (r"4:30\text{ p.m.}", r"\text{4:30 p.m.}"),
    ("am+pm", "pm+am"),
    (r"2e^3", r"2\mathrm{e}^3"),
    (r"2\pi hr", r"2\pi rh"),
    ("1234", "1,234 dollars"),
    ("1234567", "1,234,567 km"),
    ("12,000 people", "12000"),
    ("1,500 ft", "1500"),
    ("5", "5ft"),
    ("5", "5hours"),
    ("5inches", "5"),
    (r"\frac{5}{2}", r"\frac{5}{2} ft"),
    ("120", r"120\degree"),
    ("5", r"\boldsymbol{5}"),
    (r"3:30\text{ p.m.}", r"3:30\text{ PM}"),
    # variables that are units elsewhere
    ("2c", "c \\cdot 2"),
    ("x+2t", "2t+x"),
    ("a + b + c", "c+b+a"),
    ("y = mx + c", "y = c + mx"),
    ("1 - t", "-t+1"),
    (r"\frac{a}{b} + c", r"c+\frac{a}{b}"),
    ("ab + bc", "b(a+c)"),
]

WRONG = [
    # several solutions of which one is right
    ("7", r"x=5 \quad x=7"),
    ("7", r"x=5\; x=7"),
    ("7", r"x=5 \text{ or else } x=7"),
    ("7", r"x=5 \text{ and also } x=7"),
    ("2", r"x=1\\y=2"),
    # percentages
    (r"0.001\%", r"0.00104\%"),
    (r"12.5\%", "1.25"),
    ("0.125", "12.5"),
    ("12.5", r"1250\%x"),
    # what goes on without end
    ("1,2,3", r"1,2,3,\ldots"),
    (r"\{1,2\}", r"\{1,2,\ldots\}"),
    ("5", "5, ..."),
    ("5", r"5\text{pi}"),
    ("no", "on"),
    ("yes", "sey"),
    ("42", "43"),
    ("42", "-42"),
    ("42", "42.5"),
    ("42", "4\N{SUPERSCRIPT TWO}"),
    ("42", "4\N{SUBSCRIPT TWO}"),
    ("3.14", r"\approx 3.15"),
    ("36", "36x^2"),
    ("36", "36 abcm^2"),
    ("2a", r"2a \cdot ml"),
    ("36", "35 cm^2"),
    ("5", "5 a/h"),
    ("3/2", "2 1/2"),
    ("2 1/2", "3/2"),
    ("1e-8", "2e-8"),
    ("10^{-8}", "0.00000002"),
    ("1000", "10000"),
    (r"\frac{1}{3}", "0.33"),
    ("3.14159", "3.14"),
    (r"\pi", "3.14"),
    (r"\pi", r"\pi+10^{-20}"),
    ("101_2", "101_3"),
    ("2", "3=2"),
    ("2", "x=3=2"),
    ("2", r"2\sqrt{3}"),
    (r"2\sqrt{3}", "2"),
    (r"\frac{\pi}{2}", "2"),
    (r"\frac{\pi}{2}", r"\pi"),
    ("13", r"7^{10} \bmod 13"),
    (r"\frac{1}{2}", r"foo(\frac{1}{2}"),
    (r"\frac{3}{4}", r"\frac{4}{3}"),
    ("x^2", "y^2"),
    ("x^2+1", "x^2-1"),
    ("(x+1)^2", "x^2+1"),
    ("x=5", "y=5"),
    ("y=2x+1", "y=2x-1"),
    ("(3,4)", "(4,3)"),
    ("(4,3)", "(3,4)"),
    ("(3,4)", "[3,4]"),
    ("(1,2,3)", "(1,2)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("6,7", "6"),
    ("6", r"6 \text{ or } 7"),
    ("6", r"x=5 \lor x=6"),
    ("6", r"x=5 \vee 6"),
    ("6", r"x=5 \wedge y=6"),
    (r"x=5 \vee x=6", "6"),
    (r"(3,\infty)", r"x\ge 3"),
    ("x>3", "x<3"),
    (r"-\infty", r"\infty"),
    (r"\emptyset", "0"),
    (r"\emptyset", r"x<\infty"),
    (r"\emptyset", "0<1"),
    ("A", "B"),
    ("Monday", "dynamo"),
    ("Monday", "Tuesday"),
    ("5", "5 million"),
    ("5", r"5\text{ million}"),
    ("5", r"5\text{6}"),
    ("56", r"5\text{6}"),
    ("5", r"5\,\text{ 000}"),
    ("2", "2\N{VULGAR FRACTION ONE HALF}"),
    (r"\sqrt{2}x", "\N{SQUARE ROOT}(2x)"),
    ("5", r"5\text{ dozen}"),
    ("5", r"5\,\text{thousand}"),
    ("5", r"\$5\mbox{ Million}"),
    ("5", r"5\mathrm{~billion}"),
    (r"5\text{ million}", "5"),
    (r"5\text{ million}", r"5\text{ thousand}"),
    (r"5\text{ hundred}", r"5\text{ hundred thousand}"),
    ("3", "3 fourths"),
    ("3", r"3\text{ halves}"),
    ("4", "4 minus one"),
    ("4", r"4\text{ minus one}"),
    ("3", "3 times seven"),
    ("2", "2 less than five"),
    ("8", "8 over two"),
    ("5", "1/0"),
    ("1/0", "5"),
    ("3+4i", "3-4i"),
    (r"\sqrt{2}", "1.41"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("2^{10}", "1023"),
    ("42", ""),
    ("0", ""),
    (r"16\pi", "16"),
    ("16", r"16\pi"),
    ("120", "5"),
    # behind the first unit math-verify sees nothing, and takes variables for units
    ("5", r"5\text{ cm}+3\text{ cm}"),
    ("5", r"5\text{ apples},6\text{ oranges}"),
    ("12", r"12\text{ hours }30\text{ minutes}"),
    ("x", r"x\text{ if }x>0, -x\text{ otherwise}"),
    (r"10\text{ red, }5\text{ blue}", r"10\text{ red, }7\text{ blue}"),
    ("5", "5t"),
    ("2c", "2"),
    ("2c", "2d"),
    ("3t", "3h"),
    (r"\frac12h", r"\frac12"),
    ("x+2t", "x+2"),
    ("4ab", "4"),
    ("4ab", "4bc"),
    ("5", r"5\text{ or 6}"),
    ("5", r"5\text{, 6}"),
    ("5", r"5\text{ + 3}"),
    ("2", r"2\mathrm{e}^3"),
    ("4", r"4\mathrm{i}"),
    (r"2\pi", r"2\pi hr"),
    (r"3\pi", r"3\pi in"),
    (r"\frac12", r"\frac{1}{2} hr"),
    ("0,1", "1,000 dollars"),
    ("-1", r"\text{5-6}"),
    ("12", "12  squared"),
    # as often as they are there
    ("1,2,2", "1,1,2"),
    ("2,3", "2,2,3"),
    ("3", "3,3"),
    # words that change a number
    ("5", "5 hundredths"),
    ("5", "5 millionth"),
    ("5", "5 sixteenths"),
    ("5", "5 twelfths"),
    ("12", "12 squared"),
    ("12", r"12\text{ cubed}"),
    ("12", "12 factorial"),
    ("12", "12 base eight"),
    ("12", "12 below zero"),
    ("5", r"5\text{ or six}"),
    ("5", r"5\text{ or more}"),
    ("5", "5 but not six"),
    (r"3:30\text{ p.m.}", r"3:30\text{ a.m.}"),
    (r"3\text{ PM}", r"3\text{ AM}"),
]

KNOWN_LIMITS = [
    # right and refused
    ("36", "36 m^2", False),  # `m` may be a variable
    ("5", "5 m", False),
    (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } x>3", False),
    (r"\ln 2", r"\log 2", False),
    (r"5\text{ million}", "5000000", False),
    # wrong and accepted
    ("2", "x+1=2", True),
    ("(1,2)", "1,2", True),
    ("(1,2)", r"\{1,2\}", True),
    ("on", "no", True),
    ("5", "5km", True),
    (r"\pi", r"\pi+10^{-45}", True),
    # convention
    ("101", "101_2", True),
    ("50", r"50\%", True),
]

IN_PROSE = [
    ("5", "The answer is less than or equal to 5.", False),
    ("5", "The answer is at least 5.", False),
    ("5", "The answer is 5 and a half.", False),
    ("7", "So we get 3+4, which gives $7$.", True),
    ("7", "I count them one by one and find 7", True),
    ("7", "I count them one by one and find 8", False),
    ("42", "The answer is 42, since there are 7 days.", True),
    ("18", "She makes $18 every day. The answer is $18.", True),
    (r"\frac{1}{2}", r"so the probability is $\frac{1}{2}$", True),
    ("2", r"we see that x is 2\sqrt{3}", False),
    ("3", r"\boxed{3} then \boxed{4}", False),
    ("1", r"\boxed{1}, \boxed{2}", False),
    ("10", r"<think>it is \boxed{3}</think> so \boxed{10}", True),
    ("5", r"<think>try \boxed{7}? no, 5</think> The answer is 5.", True),
    ("7", r"<think>try \boxed{7}? no, 5</think> The answer is 5.", False),
    ("5", "#### Answer\n5", True),
    ("5", "### Answer\n5", True),
    ("5", "#### Conclusion\n\nThe answer is 5.", True),
    ("5", "#### Final Answer:\n\nThe answer is: $5$", True),
    ("5", "The answer is $5$ or $6$.", False),
    ("6", "The answer is $5$ or $6$.", False),
    ("5,6", "The answer is $5$ and $6$.", True),
    ("5", "The answer is 5 million dollars.", False),
    ("5", "The answer is 5 dollars, not more.", True),
    ("5", "The answer is definitely not 5.", False),
    ("5", "The answer is 5 or more.", False),
    ("5", "The answer is $5$ million dollars.", False),
    ("5", r"The answer is \(5\) hundredths", False),
    ("5", "The answer is $5$ or more", False),
    ("7", r"<think>\boxed{7}</think> $x=5$", False),
    ("5", r"<think>\boxed{7}</think> $x=5$", True),
    ("5", r"<think>hm \boxed{ </think> The value is 5.", True),
    ("6", "The answer is 6, which is less than ten.", True),
    ("12", "The answer is 12 eggs (one dozen).", True),
    ("3/4", "The answer is 3/4, or three quarters.", True),
    ("12", "The answer is the number of those who did not pass: 12.", True),
    ("0.5", r"The answer is $\frac{1}{2}$ or $0.5$.", True),
    ("2", "The answer is $2$ and $2$.", False),
    ("1234", "The answer is 1,234 dollars.", True),
    ("12", "The answer is 12 apples, which is half of 24.", True),
    ("15", "The answer is 15 minutes, or a quarter of an hour.", True),
    ("60", "The answer is that 60 is one half of 120", True),
    ("12", "The answer is 12 or more precisely 12.0", True),
    ("5", "The answer is $5$, and $x=2$ was used.", True),
    ("5", "The answer is $5$ or $6$ apples.", True),  # a list ends its clause
    ("5", "The answer is less than 5.", False),
    ("2", "so we get $2c$", False),
    ("5", r"That makes $5\text{ red and }6\text{ blue}$", False),
    ("5", r"so it is $5\text{ cm}$ long", True),
    ("5", r"<think>I need \boxed{ here</think> \boxed{5}", True),
    ("5", r"<think>\boxed{7}</think> \boxed{5", False),
]


def boxed(answers):
    return [r"so it is \boxed{" + answer + "}" for answer in answers]


def disagreements(pairs):
    verdicts = verify_answers([p for _, p, _ in pairs], [g for g, _, _ in pairs], timeout_s=30)
    return [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.correct != pair[2]]


def test_the_suite_is_large():
    assert len(RIGHT) + len(WRONG) >= 80


def test_right_answers_are_accepted():
    assert (
        disagreements([(gold, p, True) for (gold, _), p in zip(RIGHT, boxed(p for _, p in RIGHT), strict=True)]) == []
    )


def test_wrong_answers_are_refused():
    assert (
        disagreements([(gold, p, False) for (gold, _), p in zip(WRONG, boxed(p for _, p in WRONG), strict=True)]) == []
    )


def test_every_gold_answer_is_right_against_itself():
    golds = list(dict.fromkeys(gold for gold, _ in RIGHT + WRONG))
    assert disagreements([(gold, p, True) for gold, p in zip(golds, boxed(golds), strict=True)]) == []
    assert all(gold_parses(golds, timeout_s=30))


def test_answers_in_prose():
    assert disagreements(IN_PROSE) == []


def test_known_limits_are_what_the_docstring_says():
    pairs = [(gold, p, v) for (gold, _, v), p in zip(KNOWN_LIMITS, boxed(p for _, p, _ in KNOWN_LIMITS), strict=True)]
    assert disagreements(pairs) == []


@pytest.mark.parametrize(
    "gold",
    [
        "",
        "   ",
        "$$",
        r"\frac{1}{",
        r"foo(\frac{1}{2}",
        r"0.\overline{",
        "?",
        "=",
        "x^2+",
        r"\left(",
        r"7^{10} \bmod 3",
        r"3 \pmod 5",
        r"\{2k\pi : k\in\mathbb{Z}\}",
    ],
)
def test_gold_that_does_not_parse_is_an_error_for_its_item_alone(gold):
    assert gold_parses([gold, "1"], timeout_s=30) == [False, True]
    for prediction in (r"\boxed{1}", r"\boxed{" + gold + "}", "", "the answer is " + gold):
        bad, good = verify_answers([prediction, "1"], [gold, "1"], timeout_s=30)
        assert (bad.correct, bad.status) == (False, "error")
        assert good.correct


def test_unreadable_predictions_are_unparsed():
    predictions = [
        r"\boxed{\frac{1}{",
        r"\boxed{x^2+}",
        "",
        r"\boxed{foo(\frac{1}{2}}",
        r"\boxed{" + "x+" * 600 + "1}",
        "we do not know",
    ]
    for gold in ("1", "x^2", "even"):
        statuses = [verdict.status for verdict in verify_answers(predictions, [gold] * len(predictions), timeout_s=30)]
        expected = (
            {"unparsed"} if gold != "even" else {"unparsed", "ok"}
        )  # against a word, any other form is just wrong
        assert set(statuses) <= expected
