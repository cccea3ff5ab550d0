"""What `bridge-rl eval` takes on the embedded suite: 512 problems, 8 samples each, at widths 1, 2, 4 and 8.

`python benchmarks/evaluation.py` writes `benchmarks/results/evaluation.json`. Each command is a process of its own, as
a user starts it: loading, sampling, judging, analysis, tables, plots and page. Measured are the embedded base, which is
sampled once for all widths, and the same model with a Bridge of the tiny recipe's size, whose random weights are small:
it is sampled at every width; then with controls; then with controls and probes; and the last one again, which finds all
samples there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import bridge_rl as br
from bridge_rl.config import ModelSection
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.report.results import provenance

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "evaluation.json"
BASE = "package://bridge_rl/tiny/model"
GOAL_SECONDS = 90.0
WRITTEN = ("results.json", "report.html", "table.md", "widths.png")


def make_checkpoint(directory: Path) -> Path:
    section = ModelSection(BASE)
    torch.manual_seed(0)
    model = br.attach_bridge(load_model(section), br.BridgeConfig(num_heads=4, head_dim=32))
    with torch.no_grad():
        for name, parameter in br.bridge_parameters(model):
            if "o_proj" in name:
                parameter.normal_(std=0.02)
    br.save_bridge(model, directory, merged=True)
    load_tokenizer(section).save_pretrained(directory)
    return directory


def seconds_of(model: str | Path, output: Path, *options: str) -> float:
    command = [sys.executable, "launch/eval.py", "--model", str(model), "--output", str(output), *options]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    missing = [name for name in WRITTEN if not (output / name).is_file()]
    assert not missing, missing
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    options = ["--problems", str(args.problems)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = make_checkpoint(root / "model")
        seconds = {
            "base": seconds_of(BASE, root / "base", *options),
            "bridge": seconds_of(model, root / "bridge", *options),
            "bridge_controls": seconds_of(model, root / "controls", *options, "--controls"),
            "bridge_controls_probes": seconds_of(model, root / "probes", *options, "--controls", "--probes"),
            "bridge_controls_probes_again": seconds_of(model, root / "probes", *options, "--controls", "--probes"),
        }
    bars = [
        {"name": f"1 seconds, {name}", "measured": s, "threshold": f"<= {GOAL_SECONDS}", "met": s <= GOAL_SECONDS}
        for name, s in list(seconds.items())[:2]
    ]
    content = {**provenance(), "problems": args.problems, "seconds": seconds, "bars": bars}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()
