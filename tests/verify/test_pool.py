"""Workers that hang, die or are killed cost one item each; verdicts, order and the pool survive."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge_rl import verify
from bridge_rl.errors import UserError
from bridge_rl.verify import Verdict, VerifierPool, gold_parses, verify_answers

ROOT = Path(__file__).resolve().parents[2]
HANG = r"9^{9^{9^{9}}} + x"

HOSTILE = [
    r"9^{9^{9^{9}}}",
    "10000000!",
    r"\sum_{k=1}^{100000000} \frac{1}{k^2}",
    "(x+y+z+w)^{60} - (x+y-z)^{59}",
    "(" * 490 + "x" + ")" * 490,
    r"\int_0^1 \frac{\sin(x^7)\ln(1+x^3)}{\sqrt{1+x^5}} e^{x^2} \, dx",
    r"\binom{100000000}{50000000}",
    r"\prod_{k=1}^{10000000} k",
    r"\sin(10^{10^{10}})",
    r"\lfloor \pi^{10^{9}} \rfloor",
    r"2^{2^{2^{2^{2^{2}}}}}",
    r"7^{10^{9}} + 1",
    "((99!)!)!",
    r"\sqrt[3]{10^{10^{9}}+1}",
    r"\frac{1}{" * 60 + "x" + "}" * 60,
    r"x^{" * 100 + "2" + "}" * 100,
    r"\sqrt{1+" * 80 + "x" + "}" * 80,
    r"\int \int \int e^{x^2+y^2+z^2} \sin(xyz) dx dy dz",
    r"\lim_{n\to\infty} \sum_{k=1}^{n} \frac{\sin k}{k^{1.01}}",
    r"\det \begin{pmatrix} " + r"a&b&c&d&e&f&g&h&i&j\\" * 10 + r" \end{pmatrix}",
    r"\frac{d^{50}}{dx^{50}} \tan(x)",
    r"\log_{10^{-10^{9}}} (10^{10^{9}})",
    r"1000000!!",
    r"\gcd(10^{10^{8}}, 3^{10^{8}})",
    r"\{1, 2, \{3, \{4, " * 20,
    "1" + "+1" * 480,
    "x" * 900,
    "-" * 900 + "1",
    "0." + "9" * 900,
    "9" * 990,
    "1e999999999",
    r"\left(" * 150 + "1" + r"\right)" * 150,
    r"\cos(\cos(\cos(\cos(\cos(\cos(\cos(\cos(10^{10^{8}}))))))))",
    r"(a+b+c+d+e+f)^{40} = 0",
    r"x^{1000000} - 1 = 0",
    "\x00\ud800\U0001f600" * 100,
    r"\text{" * 150 + "}" * 150,
    "\\" * 900,
    "^" * 900,
    r"\frac" * 190,
]
QUICK_HOSTILE = HOSTILE[:6]
RIGHT = [(r"2\sqrt{3}", r"\boxed{\sqrt{12}}"), ("x^2+1", r"\boxed{1+x^2}"), ("(3,4)", r"\boxed{(3, 4)}")]


@pytest.fixture
def pool() -> Iterator[VerifierPool]:
    pool = VerifierPool(size=1)
    yield pool
    pool.close()


def judge_right(pool: VerifierPool) -> list[Verdict]:
    return pool.verify([p for _, p in RIGHT], [g for g, _ in RIGHT], timeout_s=30)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def survive(pool: VerifierPool, hostile: list[str], timeout_s: float) -> None:
    """No hostile item is right or takes longer than its deadline and a respawn; right verdicts follow."""
    start = time.perf_counter()
    verdicts = pool.verify([r"\boxed{" + text + "}" for text in hostile], [r"2\sqrt{3}"] * len(hostile), timeout_s)
    assert time.perf_counter() - start < len(hostile) * (timeout_s + 3) + 20
    assert not any(verdict.correct for verdict in verdicts)
    assert sum(pool.counts.values()) == len(hostile)
    assert all(verdict == Verdict(True, "ok") for verdict in judge_right(pool))


def test_quick_hostile_predictions_are_survived(pool):
    survive(pool, QUICK_HOSTILE, timeout_s=1.0)
    assert pool.counts["timeout"] >= 2


@pytest.mark.slow
def test_hostile_predictions_are_survived():
    assert len(HOSTILE) >= 30
    pool = VerifierPool(size=2)
    survive(pool, HOSTILE, timeout_s=2.0)
    pool.close()


@pytest.mark.slow
def test_hostile_gold_and_prose_are_survived():
    pool = VerifierPool(size=2)
    golds = HOSTILE[:12]
    assert not any(v.correct for v in pool.verify([r"\boxed{x}"] * len(golds), golds, timeout_s=1.0))
    prose = [f"so in the end we get ${text}$" for text in golds]
    assert not any(v.correct for v in pool.verify(prose, ["x"] * len(golds), timeout_s=1.0))
    pool.gold_parses(golds, timeout_s=1.0)
    assert all(verdict.correct for verdict in judge_right(pool))
    pool.close()


def test_a_timeout_is_named_and_hits_one_item_only(pool):
    verdicts = pool.verify([r"\boxed{x^2+1}", rf"\boxed{{{HANG}}}", r"\boxed{1+x^2}"], ["x^2+1"] * 3, timeout_s=1.5)
    assert verdicts == [Verdict(True, "ok"), Verdict(False, "timeout"), Verdict(True, "ok")]
    assert pool.counts == {"ok": 2, "timeout": 1, "unparsed": 0, "error": 0}


def test_the_clock_does_not_run_while_a_worker_starts(pool):
    assert pool.verify([r"\boxed{1+x}"], ["x+1"], timeout_s=0.25)[0].status in ("ok", "timeout")
    pool.verify([rf"\boxed{{{HANG}}}"], ["x"], timeout_s=0.25)  # killed: the next item waits for a start of 0.4 s
    assert pool.verify([r"\boxed{42+x-x}"], ["x"], timeout_s=0.25)[0].status in ("ok", "timeout")
    assert pool.counts["error"] == 0


def test_numbers_and_words_start_no_worker(pool):
    assert [v.correct for v in pool.verify([r"\boxed{42}", "43", "Monday"], ["42", "42", "monday"])] == [
        True,
        False,
        True,
    ]
    assert pool.worker_pids == []


def test_the_pool_grows_only_to_what_is_needed():
    pool = VerifierPool(size=6)
    pool.verify([r"\boxed{1+x}", r"\boxed{x+2}", "7"], ["x+1", "x+2", "7"], timeout_s=30)
    assert 1 <= len(pool.worker_pids) <= 2
    pool.close()


def test_equal_pairs_are_judged_once_and_counted_each(pool):
    start = time.perf_counter()
    verdicts = pool.verify([rf"\boxed{{{HANG}}}"] * 8, ["x"] * 8, timeout_s=1.0)
    assert [v.status for v in verdicts] == ["timeout"] * 8
    assert time.perf_counter() - start < 6
    assert pool.counts["timeout"] == 8


def test_unequal_lengths_and_silly_deadlines_are_refused(pool):
    with pytest.raises(ValueError, match="2 predictions for 1 gold"):
        verify_answers(["1", "2"], ["1"])
    for timeout_s in (0, float("nan"), float("inf"), "5", None):
        with pytest.raises(UserError, match=f"timeout_s is {timeout_s!r}: it must be"):
            pool.verify(["1"], ["1"], timeout_s=timeout_s)
    assert verify_answers([], []) == []
    assert gold_parses([]) == []


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ("5", "is '5': it must be a list"),
        ([5], "number 0 is 5: give a text"),
        ([None], "number 0 is None: give a text"),
    ],
)
def test_answers_that_are_no_texts_are_refused(texts, sentence):
    with pytest.raises(UserError, match=f"predictions:? {sentence}"):
        verify_answers(texts, ["5"])
    with pytest.raises(UserError, match=f"gold:? {sentence}"):
        verify_answers(["5"], texts)


def test_the_number_of_workers_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("BRIDGE_RL_VERIFIER_WORKERS", "3")
    assert VerifierPool().size == 3
    monkeypatch.setenv("BRIDGE_RL_VERIFIER_WORKERS", "many")
    with pytest.raises(UserError, match="BRIDGE_RL_VERIFIER_WORKERS"):
        VerifierPool()


@pytest.mark.parametrize(
    ("cores", "bound", "ranks", "workers"),
    [(16, 16, 1, 8), (16, 16, 8, 2), (4, 4, 8, 1), (64, 8, 8, 8), (64, 4, 8, 4), (2, 1, 1, 1)],
)
def test_ranks_share_the_cores_of_a_machine_unless_each_has_its_own(cores, bound, ranks, workers, monkeypatch):
    monkeypatch.delenv("BRIDGE_RL_VERIFIER_WORKERS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)), raising=False)
    assert VerifierPool().size == workers


def test_a_large_parent_does_not_make_its_workers_leave():
    """A child's ru_maxrss starts at its parent's: with it, a trainer of many GiB would restart a worker every item."""
    ballast = bytearray(300 * 2**20)  # the parent is above half of the workers' limit
    pool = VerifierPool(size=1, memory_bytes=600 * 2**20)
    judge_right(pool)
    (pid,) = pool.worker_pids
    for _ in range(3):
        judge_right(pool)
        time.sleep(0.05)
    assert pool.worker_pids == [pid]
    pool.close()
    del ballast


def test_a_worker_killed_once_from_outside_costs_nothing(pool):
    judge_right(pool)
    (pid,) = pool.worker_pids
    os.kill(pid, signal.SIGSTOP)  # holds the item in flight
    result: list[Verdict] = []
    thread = threading.Thread(target=lambda: result.extend(pool.verify([r"\boxed{x+2}"], ["2+x"], timeout_s=30)))
    thread.start()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    thread.join(60)
    assert result == [Verdict(True, "ok")]
    assert pool.worker_pids != [pid]


def test_an_item_whose_worker_is_killed_twice_is_an_error_and_the_pool_goes_on(pool):
    judge_right(pool)
    (first,) = pool.worker_pids
    result: list[Verdict] = []
    thread = threading.Thread(target=lambda: result.extend(pool.verify([rf"\boxed{{{HANG}}}"], ["x"], timeout_s=60)))
    thread.start()
    time.sleep(0.3)
    os.kill(first, signal.SIGKILL)
    # A worker is listed once it is ready, and then takes up the item at once.
    wait_until(lambda: pool.worker_pids not in ([], [first]))
    time.sleep(0.3)
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    thread.join(60)
    assert result == [Verdict(False, "error")]
    assert all(verdict.correct for verdict in judge_right(pool))


def test_an_idle_worker_that_died_is_replaced(pool):
    judge_right(pool)
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    time.sleep(0.2)
    assert judge_right(pool) == [Verdict(True, "ok")] * 3


def test_memory_beyond_the_limit_is_an_error_or_a_timeout_and_the_pool_goes_on():
    pool = VerifierPool(size=1, memory_bytes=200 << 20)
    verdict = pool.verify([r"\boxed{x + 2^{3000000000}}"], ["x"], timeout_s=20)[0]
    assert not verdict.correct
    assert all(v.correct for v in judge_right(pool))
    pool.close()


def test_a_worker_that_cannot_start_is_a_loud_error():
    pool = VerifierPool(size=1, memory_bytes=1 << 20)
    with pytest.raises(RuntimeError, match="did not start"):
        pool.verify([r"\boxed{x+1}"], ["1+x"])
    pool.close()


def test_many_threads_may_call_at_once():
    items = [(rf"\boxed{{{n}+x}}", f"x+{n + n % 2}", n % 2 == 0) for n in range(24)]
    wrong: list[object] = []

    def call(offset: int) -> None:
        mine = items[offset:] + items[:offset]
        verdicts = verify_answers([p for p, _, _ in mine], [g for _, g, _ in mine], timeout_s=30)
        wrong.extend((item, v) for item, v in zip(mine, verdicts, strict=True) if v != Verdict(item[2], "ok"))

    threads = [threading.Thread(target=call, args=(3 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert len(verify.shared_pool().worker_pids) <= verify.shared_pool().size


def test_workers_import_no_torch_and_the_parent_no_sympy(pool):
    judge_right(pool)
    maps = Path(f"/proc/{pool.worker_pids[0]}/maps").read_text()
    assert "libtorch" not in maps
    code = "import sys, bridge_rl.verify as v; assert v.verify_answers(['1+x'], ['x+1'], 60)[0].correct;"
    code += "assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_workers_end_with_a_killed_parent_even_while_busy():
    script = textwrap.dedent(
        rf"""
        import threading, time
        from bridge_rl.verify import VerifierPool
        pool = VerifierPool(size=2)
        pool.verify([r"\boxed{{x+1}}"], ["1+x"], 60)
        hanging = [r"\boxed{{{HANG}}}", r"\boxed{{1+{HANG}}}"]
        threading.Thread(target=pool.verify, args=(hanging, ["x", "x"], 600)).start()
        while len(pool.worker_pids) < 2:
            time.sleep(0.05)
        print(*pool.worker_pids, flush=True)
        time.sleep(600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(alive, workers))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(alive, workers)), 10)


def test_a_process_that_ends_normally_leaves_no_worker():
    script = "from bridge_rl.verify import verify_answers, shared_pool\n"
    script += "assert verify_answers(['1+x'], ['x+1'], 60)[0].correct\nprint(*shared_pool().worker_pids)"
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120, capture_output=True, text=True
    )
    assert out.stderr == ""
    workers = [int(pid) for pid in out.stdout.split()]
    wait_until(lambda: not any(map(alive, workers)), 10)


def test_a_fork_of_the_trainer_gets_a_pool_of_its_own():
    script = textwrap.dedent(
        """
        import os
        from bridge_rl.verify import verify_answers
        assert verify_answers(["1+x"], ["x+1"], 60)[0].correct
        child = os.fork()
        right = verify_answers(["2+x"], ["x+2"], 60)[0].correct
        if child == 0:
            os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert right
        """
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_verifying_beside_a_gloo_process_group(tmp_path):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert verify_answers([rf"\boxed{{{HANG}}}", r"\boxed{3+x}"], ["x", "x+3"], timeout_s=2)[1].correct
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()


def test_what_the_parsers_print_does_not_reach_the_protocol(pool, capfd):
    verdicts = pool.verify([r"\boxed{x @@ ## 1}", r"\boxed{\unknown{x}{}}", r"\boxed{x+1}"], ["1+x"] * 3, timeout_s=30)
    assert [v.correct for v in verdicts] == [False, False, True]
    assert capfd.readouterr().out == ""
