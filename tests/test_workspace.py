"""No panel of the W&B dashboard points at nothing: its definition is compared with what a real run wrote."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb_workspaces.reports.v2 as wr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bridge_rl.config import load_recipe
from bridge_rl.errors import UserError
from bridge_rl.report import names
from bridge_rl.report.tracking import trackers
from bridge_rl.report.workspace import definition, save_workspace, section, workspace

RECIPE = "recipes/tiny_arith.yaml"
RUN = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=16",
    "training.logging_steps=1",
    "training.log_completions=true",
    "training.report_to=[tensorboard,trackio]",
    "logging.wandb=offline",
    "logging.project=tiny",
    "warmup=null",
    "rollout.dynamic_sampling={max_rounds: 1}",
    "evaluation.problems=2",
    "evaluation.samples=2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps and an evaluation, logged to W&B, TensorBoard and trackio without a network."""
    output = tmp_path_factory.mktemp("run")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {"TRACKIO_DIR": str(output / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bridge_rl.cli", "train", RECIPE, *RUN, f"output_dir={output}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def logged(run) -> set[str]:
    """Every key in the history that W&B's own offline file holds; of a table it holds `KEY._type` and more."""
    [log] = run.glob("wandb/offline-run-*/*.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {key.removesuffix("._type") for item in history for key in item}


def panels_of(view) -> list[dict]:
    """Every panel in the definition that goes to the server."""
    sections = definition(view)["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for part in sections for panel in part["panels"]]


def points_at_nothing(view, logged: set[str]) -> list[str]:
    """Metrics, patterns and tables of the view's panels for which there is no key in `logged`."""
    missing = []
    for panel in panels_of(view):
        config = panel["config"]
        if panel["viewType"] == "Run History Line Plot":
            pattern = config.get("metricRegex")
            keys = [*config.get("metrics", []), config["xAxis"]]
            assert pattern or config.get("metrics")
            if pattern and not any(re.search(pattern, key) for key in logged):
                missing.append(pattern)
        else:
            assert panel["viewType"] == "Weave"  # a table
            keys = [config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]]
        missing += [key for key in keys if key not in logged]
    return missing


def test_no_panel_points_at_nothing(logged):
    assert points_at_nothing(workspace("tiny", "team"), logged) == []


@pytest.mark.parametrize(
    ("panel", "missing"),
    [
        (wr.LinePlot(x="train/global_step", y=["train/reward", "train/group/al_right"]), "train/group/al_right"),
        (wr.LinePlot(x="train/globalstep", y=["train/reward"]), "train/globalstep"),
        (wr.LinePlot(x="train/global_step", metric_regex=r"^train/bridge/layer_\d+$"), r"^train/bridge/layer_\d+$"),
        (wr.WeavePanelSummaryTable(table_name="completion"), "completion"),
    ],
    ids=["metric", "axis", "pattern", "table"],
)
def test_a_misspelt_panel_is_found(panel, missing, logged):
    view = workspace("tiny", "team")
    view.sections.append(section("broken", panel))
    assert points_at_nothing(view, logged) == [missing]


def test_the_widths_shown_are_those_that_were_evaluated():
    logged = {names.in_tracker(names.evaluation(name, width)) for name in names.EVALUATION for width in (1, 16)}
    patterns = [panel["config"].get("metricRegex") for panel in panels_of(workspace("tiny", "team"))]
    shown = [{key for key in logged if re.search(pattern, key)} for pattern in patterns if pattern]
    assert [keys for keys in shown if keys] == [{f"eval/{name}/w1", f"eval/{name}/w16"} for name in names.EVALUATION]


def test_every_metric_of_ours_has_a_panel():
    shown = [panel["config"].get("metrics", []) for panel in panels_of(workspace("tiny", "team"))]
    shown = {metric for metrics in shown for metric in metrics}
    assert {names.in_tracker(name) for name in (*names.TRAIN, *names.DYNAMIC)} <= shown


def test_wandb_has_what_the_history_has(run, logged):
    entries = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert len(steps) == 2
    assert {names.in_tracker(name) for name in steps[0] if name != "step"} <= logged
    assert {names.in_tracker(name) for name in entries[-1] if name != "step"} <= logged
    assert {*names.TRAIN, *names.DYNAMIC} <= set(steps[0])


def test_wandb_has_the_table_of_completions_by_group(run):
    tables = sorted(run.glob("wandb/offline-run-*/files/media/table/completions_*.table.json"))
    content = json.loads(tables[-1].read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    groups = [row["group"] for row in rows]
    assert groups == [group for group in groups[::4] for _ in range(4)]
    assert len(set(groups)) == 4
    for group in set(groups):
        assert len({json.dumps(row["prompt"]) for row in rows if row["group"] == group}) == 1


def test_tensorboard_has_the_same_keys_and_values(run, logged):
    found = {}
    for file in sorted(run.glob("tensorboard/**/events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    ours = {names.in_tracker(name) for name in names.TRAIN} | {f"eval/{name}/w4" for name in names.EVALUATION}
    assert ours <= set(found)
    last = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()][1]
    assert found["train/reward"] == pytest.approx(last["reward"])
    assert found[names.in_tracker(names.NORM_RATIO)] == pytest.approx(last[names.NORM_RATIO])


def test_trackio_has_the_same_keys(run):
    with sqlite3.connect(run / "trackio" / "tiny.db") as database:
        found = {key for (text,) in database.execute("select metrics from metrics") for key in json.loads(text)}
    assert {names.in_tracker(name) for name in names.TRAIN} <= found
    assert {f"eval/{name}/w4" for name in names.EVALUATION} <= found


def test_trackers_are_those_of_the_recipe_and_wandb():
    def of(*overrides):
        return trackers(load_recipe(RECIPE, overrides))

    assert of() == []
    assert of("logging.wandb=offline") == ["wandb"]
    assert of("training.report_to=tensorboard") == ["tensorboard"]
    assert of("training.report_to=[tensorboard,trackio]", "logging.wandb=offline") == [
        "tensorboard",
        "trackio",
        "wandb",
    ]
    with pytest.raises(UserError, match="use tensorboard or trackio, and logging"):
        of("training.report_to=[wandb]")


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("bridge_rl.report.tracking.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install trackio"):
        trackers(load_recipe(RECIPE, ["training.report_to=trackio"]))


def test_a_dry_run_writes_the_definition_and_says_so(tmp_path):
    path = tmp_path / "views" / "workspace.json"
    said = save_workspace("tiny", "team", dry_run=True, path=path)
    assert said == f"The definition of the W&B view is in {path}; nothing was sent."
    content = json.loads(path.read_text())
    assert (content["project"], content["entity"]) == ("tiny", "team")
    assert "train/reward" in path.read_text()


def test_without_a_key_nothing_is_sent_and_the_sentence_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("bridge_rl.report.workspace.has_key", lambda: False)
    said = save_workspace("tiny", path=tmp_path / "workspace.json")
    assert "no W&B API key" in said
    assert (tmp_path / "workspace.json").is_file()


class Server(BaseHTTPRequestHandler):
    """Answers as W&B's GraphQL does: who asks, and that a view was taken (or not)."""

    views: list = []  # noqa: RUF012
    refuses = False

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = {"data": {"viewer": {"id": "1", "entity": "team", "username": "u", "teams": {"edges": []}}}}
        if b"upsertView" in body:
            self.views.append(json.loads(body)["variables"])
            answer = {"data": {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}, "inserted": True}}}
            if self.refuses:
                answer = {"errors": [{"message": "permission denied"}], "data": None}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"views": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def save_at(url: str) -> subprocess.CompletedProcess:
    """In a process of its own: W&B keeps the server it has first met."""
    script = "from bridge_rl.report.workspace import save_workspace; print(save_workspace('tiny'))"
    env = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)


def test_the_view_that_is_saved_is_the_one_defined(server):
    handler, url = server
    done = save_at(url)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"The W&B view is at {url}/team/tiny?nw=abc" in done.stdout
    [view] = handler.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "tiny", "Bridge RL")

    def parts(spec):
        sections = spec["section"]["panelBankConfig"]["sections"]
        return [(part["name"], [panel["config"] for panel in part["panels"]]) for part in sections]

    assert parts(json.loads(view["spec"])) == parts(definition(workspace("tiny", "team"))["spec"])


def test_a_refusal_by_the_server_is_one_sentence(server):
    handler, url = server
    handler.refuses = True
    done = save_at(url)
    assert done.returncode == 1
    assert "UserError: W&B did not take the view of 'tiny'" in done.stderr


def test_a_missing_package_is_one_sentence_with_the_command():
    script = "import sys; sys.modules['wandb_workspaces'] = None; import bridge_rl.report.workspace"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert re.search(r"UserError: The W&B dashboard needs .*pip install 'wandb-workspaces>=0", done.stderr)
