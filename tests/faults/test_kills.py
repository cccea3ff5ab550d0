"""A run that is killed anywhere, and started again, ends with the weights and the log of one that was not."""

import json
import random
import re
from pathlib import Path

import pytest
from chain import RECIPE, history, run_all, weights

pytestmark = pytest.mark.slow
LAST, EPOCH = 30, 12  # optimizer steps of a run, and of an epoch, in RECIPE
# Every so many steps a run comes by: updates, rollouts (a generation batch serves four), saves.
EVERY = {
    "in the rollout": 4,
    "after the rollout": 4,
    "before the forward": 1,
    "before the backward": 1,
    "after the backward": 1,
    "in the logging": 4,
    "in a file": 3,
    "before the weights": 3,
    "before the optimizer state": 3,
    "after the RNG": 3,
    "before the manifest": 3,
    "after the manifest": 3,
    "after the renaming": 3,
    "before the deletion": 3,
}


def moments(seed: int, number: int) -> list[dict]:
    """`number` different points at different random steps, in the order of these; two points are always among them."""
    draw = random.Random(seed)
    points = ["in the rollout", "before the backward"]
    points += draw.sample(sorted(EVERY.keys() - set(points)), number - 2)
    kills: dict[int, dict] = {}
    for point in sorted(points, key=lambda point: -EVERY[point]):  # those with the fewest steps choose first
        step = draw.choice([step for step in range(EVERY[point], LAST, EVERY[point]) if step not in kills])
        kills[step] = {"point": point, "step": step, "count": draw.randrange(1, 8) if point == "in the rollout" else 1}
    return [kills[step] for step in sorted(kills)]


def runs(output: Path, kills: list[dict], *overrides: str) -> list[dict]:
    """The same command once for each kill, and once more."""
    argv = [*RECIPE, f"output_dir={output}", *overrides]
    return [{"argv": argv, **kill} for kill in [*kills, {}]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("whole")
    assert run_all(directory, runs(directory / "out", [])) == [[0]]
    return directory / "out"


def assert_same(output: Path, expected: Path) -> None:
    assert weights(output) == weights(expected)
    assert history(output) == history(expected)


def test_the_run_that_is_killed_learns_and_reaches_its_third_epoch(whole):
    entries = [entry for entry in history(whole) if "loss" in entry]
    assert [entry["step"] for entry in entries] == [4, 8, 12, 16, 20, 24, 28]
    assert all(entry["grad_norm"] > 1e-3 for entry in entries)
    assert all(0 < entry["reward"] < 1 for entry in entries)
    assert entries[-1]["epoch"] == pytest.approx(28 / EPOCH, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_at_random_moments_change_nothing(whole, tmp_path, seed):
    kills = moments(seed, 10)
    assert any(kill["step"] > EPOCH for kill in kills)
    codes = run_all(tmp_path, runs(tmp_path / "out", kills))
    assert codes == [[-9]] * 10 + [[0]], kills
    assert_same(tmp_path / "out", whole)


def test_kills_in_rollout_update_and_save_change_nothing(whole, tmp_path):
    kills = [
        {"point": "in the rollout", "step": 4, "count": 3},
        {"point": "in a file", "step": 9},
        {"point": "after the backward", "step": 17},
        {"point": "after the training", "step": 30, "count": 2},  # once is in the checkpoint
    ]
    assert run_all(tmp_path, runs(tmp_path / "out", kills)) == [[-9]] * 4 + [[0]]
    assert_same(tmp_path / "out", whole)
    log = (tmp_path / "log.txt").read_text()
    assert "checkpoint-9.partial is half-written" in log
    for step in (3, 6, 15, 30):
        assert f"going on from {tmp_path / 'out' / f'checkpoint-{step}'}" in log


def test_without_the_samplers_epoch_a_resumed_run_ends_elsewhere(whole, tmp_path):
    """Negative control: one kill in the second epoch."""
    killed, resumed = runs(tmp_path / "out", [{"point": "before the forward", "step": 14}])
    assert run_all(tmp_path, [killed, {**resumed, "patch": "forget the epoch"}]) == [[-9], [0]]
    assert weights(tmp_path / "out") != weights(whole)


def test_two_ranks_killed_anywhere_end_as_if_they_were_not(tmp_path):
    rows = "training.per_device_train_batch_size=8"
    kills = [{**kill, "rank": number % 2} for number, kill in enumerate(moments(2, 10))]
    for kill in kills:
        if kill["point"] in ("before the weights", "before the deletion", "after the renaming"):
            kill["rank"] = 0  # which alone comes by there
    for name, some in (("whole", []), ("killed", kills)):
        codes = run_all(tmp_path, runs(tmp_path / name, some, rows), ranks=2)
        assert codes[-1] == [0, 0]
        assert all(-9 in ranks for ranks in codes[:-1])
        manifest = json.loads((tmp_path / name / "checkpoint-30" / "manifest.json").read_text())["content"]
        assert manifest["num_processes"] == 2
        assert {"rollout_state_0.pt", "rollout_state_1.pt", "rng_state_1.pth"} <= manifest["files"].keys()
    assert_same(tmp_path / "killed", tmp_path / "whole")


def test_damaged_checkpoints_and_a_full_disk_change_nothing(whole, tmp_path):
    """Two kills, a damage after each; then a disk that fills up, which is a user's problem: exit code 2."""
    first, second, last = runs(
        tmp_path / "out", [{"point": "before the forward", "step": 10}, {"point": "before the backward", "step": 20}]
    )
    some = [first, {**second, "patch": "truncate"}, {**last, "patch": "flip a bit"}, last]
    some[2:2] = [{**last, "patch": "fill the disk"}]
    codes = run_all(tmp_path, some)
    log = (tmp_path / "log.txt").read_text()
    assert codes == [[-9], [-9], [2], [0], [0]], log[-3000:]
    out = re.escape(str(tmp_path / "out"))
    assert re.search(
        rf"{out}/checkpoint-9/optimizer.pt is damaged \([\d,]+ bytes instead of [\d,]+\): it is set aside", log
    )
    assert re.search(rf"{out}/checkpoint-21/model.safetensors is damaged \(other content than was written\)", log)
    going_on = re.findall(rf"going on from {out}/checkpoint-(\d+)", log)
    assert going_on == ["6", "18", "18", "30"]
    assert re.search(rf"error: {out} has no room for checkpoint-24: [\d,]+ bytes are missing of the [\d,]+ that", log)
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (
            ["train=lora", "lora.dropout=0.1", "guards.max_rollout_kl=null", "training.beta=0.1"],
            "adapter_model.safetensors",
        ),
        (["train=full", "training.beta=0.1"], "model.safetensors"),  # with a reference that is a model of its own
    ],
    ids=["lora", "full"],
)
def test_kills_of_lora_and_beside_a_reference_change_nothing(tmp_path, options, file):
    kills = [
        {"point": "in the rollout", "step": 4, "count": 3},
        {"point": "before the manifest", "step": 6},
    ]
    options = [*options, "training.max_steps=10", "training.logging_steps=2"]
    codes = run_all(tmp_path, [*runs(tmp_path / "whole", [], *options), *runs(tmp_path / "killed", kills, *options)])
    assert codes == [[0], [-9], [-9], [0]], (tmp_path / "log.txt").read_text()[-3000:]
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert all(entry["kl"] > 0 for entry in history(tmp_path / "whole")[2:] if "kl" in entry)
    assert any("kl" in entry for entry in history(tmp_path / "whole"))


@pytest.mark.parametrize("stage", [2, 3])
def test_kills_under_zero_change_nothing(tmp_path, stage):
    options = ["training.per_device_train_batch_size=8", f"launch.zero_stage={stage}", "training.max_steps=10"]
    kills = [
        {"point": "after the RNG", "step": 6, "rank": 1},
        {"point": "before the backward", "step": 7, "rank": 0},
    ]
    for name, some in (("whole", []), ("killed", kills)):
        codes = run_all(tmp_path, runs(tmp_path / name, some, *options), ranks=2)
        assert codes[-1] == [0, 0], (tmp_path / "log.txt").read_text()[-3000:]
        assert all(-9 in ranks for ranks in codes[:-1])
    manifest = json.loads((tmp_path / "killed" / "checkpoint-10" / "manifest.json").read_text())["content"]
    shards = [name for name in manifest["files"] if name.endswith("optim_states.pt")]
    assert len(shards) == 2
    assert_same(tmp_path / "killed", tmp_path / "whole")
