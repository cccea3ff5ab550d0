"""Recipes: YAML, overrides, inheritance, and what is said about a wrong key."""

from pathlib import Path

import pytest
import yaml

from bridge_rl.config import load_recipe
from bridge_rl.errors import UserError
from bridge_rl.typed_yaml import nearest

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = RECIPES / "tiny_arith.yaml"
MAIN = sorted(p for p in RECIPES.glob("*.yaml") if not p.stem.endswith(("_rlvr_only", "_pmatch")))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_recipe_says_what_its_file_says_and_the_rest_has_defaults(tmp_path):
    text = """
model: {path: some/model, dtype: bfloat16}
bridge: {num_heads: 4, head_dim: 12, layers: [0, 2]}
data: {train: {path: p.jsonl}}
rewards: [{function: rewards/answer.py:correct, weight: 2}]
rollout: {width: 2}
output_dir: runs/x
"""
    recipe = load_recipe(write(tmp_path / "r.yaml", text))
    assert (recipe.model.path, recipe.model.dtype) == ("some/model", "bfloat16")
    assert (recipe.bridge.kind, recipe.bridge.inner_width, recipe.bridge.layers) == ("bridge", 48, [0, 2])
    assert (recipe.rewards[0].function, recipe.rewards[0].weight) == ("rewards/answer.py:correct", 2.0)
    assert (recipe.rollout.width, recipe.rollout.num_generations) == (2, 8)
    assert (recipe.train, recipe.seed, recipe.warmup, recipe.training) == ("bridge", 0, None, {})


def test_overrides_go_into_sections_and_win_over_the_file():
    overrides = ["rollout.width=2", "seed=7", "data.train.kwargs.size=16", "evaluation.widths=[1, 2]", "train=lora"]
    recipe = load_recipe(TINY, overrides)
    assert recipe.rollout.width == 2
    assert recipe.rollout.num_generations == 8  # beside it, untouched
    assert recipe.seed == 7
    assert recipe.data.train.kwargs == {"seed": 10, "size": 16}
    assert recipe.evaluation.widths == [1, 2]
    assert recipe.train == "lora"


def test_the_last_of_two_overrides_of_a_key_wins():
    assert load_recipe(TINY, ["seed=1", "seed=2"]).seed == 2


def test_an_override_makes_a_section_that_the_file_leaves_out():
    assert load_recipe(TINY, ["lora.r=4"]).lora.r == 4
    assert load_recipe(TINY, ["data.train.answer_pattern='#### (.+)'"]).data.train.answer_pattern == "#### (.+)"


def test_an_override_may_start_with_dashes_and_hold_an_equals_sign():
    recipe = load_recipe(TINY, ["--seed=3", "data.prompt='{problem} x=?'"])
    assert recipe.seed == 3
    assert recipe.data.prompt == "{problem} x=?"


def test_an_override_goes_into_a_list():
    recipe = load_recipe(TINY, ["rewards.0.weight=2", "evaluation.widths.1=3"])
    assert [(reward.function, reward.weight) for reward in recipe.rewards] == [("rewards/two_tries.py:correct", 2.0)]
    assert recipe.evaluation.widths == [1, 3, 4, 8]


def test_an_override_reaches_one_of_two_sections_of_an_anchor(tmp_path):
    text = "model: {path: a}\ndata: {train: &s {path: b}, eval: *s}\nrewards: [{function: c}]\noutput_dir: d\n"
    file = write(tmp_path / "r.yaml", text)
    data = load_recipe(file, ["data.train.size=3"]).data
    assert (data.train.size, data.eval.size) == (3, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### (.+)", "#### (.+)"),
        ("Think. # Then answer", "Think. # Then answer"),
        ("Think: # yes", "Think: # yes"),
        ("Problem #1", "Problem #1"),
        ("a#b", "a#b"),
        ("'a # b'", "a # b"),
        ('"a # b"', "a # b"),
    ],
)
def test_a_hash_cuts_nothing_off_an_override(text, value):
    assert load_recipe(TINY, [f"data.system_prompt={text}"]).data.system_prompt == value


def test_null_switches_a_section_off():
    assert load_recipe(TINY, ["warmup=null"]).warmup is None
    assert load_recipe(TINY, ["data.eval=null"]).data.eval is None


def test_null_drops_the_keyword_arguments_of_the_recipe_below(tmp_path):
    file = write(tmp_path / "r.yaml", f"extends: {TINY}\ndata: {{train: {{path: p.jsonl, kwargs: null}}}}\n")
    for recipe in (load_recipe(file), load_recipe(TINY, ["data.train.path=p.jsonl", "data.train.kwargs=null"])):
        assert (recipe.data.train.path, recipe.data.train.kwargs) == ("p.jsonl", {})


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    data = ["data.train.path", "data.eval.path", "warmup.data.path"]
    keys = ["output_dir", "resume", "model.path", "warmup.path", *data]
    recipe = load_recipe(TINY, ["rewards.0.function=~/r.py:f", *(f"{key}=~/x" for key in keys)])
    assert recipe.to_yaml().count(": /home/me/x\n") == len(keys)
    assert recipe.rewards[0].function == "/home/me/r.py:f"
    assert load_recipe(TINY, ["output_dir=runs/~x"]).output_dir == "runs/~x"
    monkeypatch.setenv("HOME", str(TINY.parent))
    assert load_recipe(write(tmp_path / "r.yaml", "extends: ~/tiny_arith.yaml\n")) == load_recipe(TINY)


def test_off_needs_no_quotes():
    assert load_recipe(TINY, ["logging.wandb=off"]).logging.wandb == "off"
    with pytest.raises(UserError, match=r"the key 'logging.wandb' is True: input should be 'off', 'offline' or"):
        load_recipe(TINY, ["logging.wandb=on"])


def test_a_no_without_quotes_is_a_strategy():
    recipe = load_recipe(TINY, ["training.save_strategy=no", "training.logging_strategy=no"])
    assert (recipe.training["save_strategy"], recipe.training["logging_strategy"]) == ("no", "no")


def test_without_a_bridge_there_is_no_warm_up():
    recipe = load_recipe(TINY, ["bridge=null"])
    assert recipe.bridge is None
    assert recipe.warmup is None


def test_without_a_bridge_the_bridge_cannot_be_what_is_trained():
    with pytest.raises(UserError, match="set train=full or train=lora"):
        load_recipe(TINY, ["bridge=null", "train=bridge"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        ("1.5e3", 1500.0),
        ("2E+3", 2000.0),
        ("-5e-1", -0.5),
        ("0.001", 0.001),
        (".5", 0.5),
        ("3", 3),
        ("010", 10),
        ("1_000", 1000),
        ("0x1F", 31),
    ],
)
def test_numbers_are_numbers_in_typed_and_in_free_sections(text, number, tmp_path):
    recipe = load_recipe(TINY, [f"training.learning_rate={text}"])
    assert recipe.training["learning_rate"] == number
    assert type(recipe.training["learning_rate"]) is type(number)
    file = write(
        tmp_path / "r.yaml",
        f"extends: {TINY}\nrewards: [{{function: 'a.py:b', weight: {text}}}]\ntraining: {{beta: {text}}}\n",
    )
    assert load_recipe(file).rewards[0].weight == number
    assert load_recipe(file).training["beta"] == number


def test_a_quoted_number_and_a_name_stay_text():
    recipe = load_recipe(TINY, ["training.save_strategy='no'", "output_dir='1e-6'"])
    assert recipe.training["save_strategy"] == "no"
    assert recipe.output_dir == "1e-6"


@pytest.mark.parametrize("text", ["2026-11-30", "2026-13-45", "0x_", "1:30", "'010'"])
def test_a_date_and_what_is_nearly_a_number_are_text(text, tmp_path):
    recipe = load_recipe(TINY, [f"logging.name={text}"])
    assert recipe.logging.name == text.strip("'")
    assert load_recipe(write(tmp_path / "r.yaml", recipe.to_yaml())) == recipe
    assert load_recipe(write(tmp_path / "e.yaml", f"extends: {TINY}\nlogging: {{name: {text}}}\n")) == recipe
    assert yaml.safe_load(recipe.to_yaml())["logging"]["name"] == recipe.logging.name  # as others read it


def test_a_merge_is_no_key_that_stands_twice(tmp_path):
    text = """
data:
  train: &source {path: a, size: 1}
  eval: {<<: *source, size: 2}
model: {path: a}
rewards: [{function: b}]
output_dir: c
"""
    data = load_recipe(write(tmp_path / "r.yaml", text)).data
    assert (data.eval.path, data.train.size, data.eval.size) == ("a", 1, 2)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_recipe_reads_back_as_itself(path, tmp_path):
    recipe = load_recipe(path, ["training.learning_rate=1e-6", "output_dir='1e-6'", "data.system_prompt='a: b\n# c'"])
    again = load_recipe(write(tmp_path / "resolved.yaml", recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_a_recipe_lies_over_the_one_it_extends(tmp_path):
    write(tmp_path / "base.yaml", TINY.read_text())
    write(tmp_path / "middle.yaml", "extends: base.yaml\nrollout: {width: 8}\nseed: 1\n")
    recipe = load_recipe(write(tmp_path / "top.yaml", "extends: middle.yaml\nseed: 2\nwarmup: null\n"))
    assert recipe.rollout.width == 8  # of the middle
    assert recipe.rollout.num_generations == 8  # of the base
    assert recipe.seed == 2  # of the top
    assert recipe.warmup is None


def test_extends_is_relative_to_the_recipe_that_says_it(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "base.yaml", TINY.read_text())
    file = write(tmp_path / "recipes" / "top.yaml", "extends: ../base.yaml\nseed: 2\n")
    monkeypatch.chdir("/")
    assert load_recipe(file).seed == 2


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UserError, match="break the circle"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("path", MAIN, ids=lambda path: path.stem)
def test_the_control_without_a_bridge_differs_in_the_bridge_alone(path):
    recipe = load_recipe(path)
    control = load_recipe(path.with_name(f"{path.stem}_rlvr_only.yaml"))
    assert control.bridge is None
    assert control.warmup is None
    assert control.train == "full"
    assert control.output_dir == f"{recipe.output_dir}_rlvr_only"
    for section in ("model", "data", "rewards", "rollout", "training", "evaluation", "launch", "seed"):
        assert getattr(control, section) == getattr(recipe, section), section


@pytest.mark.parametrize("path", MAIN, ids=lambda path: path.stem)
def test_the_matched_control_differs_in_the_kind_of_block_alone(path):
    recipe = load_recipe(path)
    control = load_recipe(path.with_name(f"{path.stem}_pmatch.yaml"))
    assert recipe.bridge.kind == "bridge"
    assert control.bridge.kind == "pmatch"
    assert control.bridge.inner_width == recipe.bridge.inner_width
    assert control.output_dir == f"{recipe.output_dir}_pmatch"
    for section in (
        "model",
        "data",
        "rewards",
        "rollout",
        "warmup",
        "train",
        "training",
        "evaluation",
        "launch",
        "seed",
    ):
        assert getattr(control, section) == getattr(recipe, section), section


@pytest.mark.parametrize(
    ("override", "wrong", "right"),
    [
        ("rolout.width=4", "rolout", "rollout"),
        ("rollout.widht=4", "rollout.widht", "width"),
        ("bridge.num_head=4", "bridge.num_head", "num_heads"),
        ("data.train.answer_colum=a", "data.train.answer_colum", "answer_column"),
        ("rewards=[{functon: a}]", "rewards.0.functon", "function"),
        ("rewards.0.wieght=2", "rewards.0.wieght", "weight"),
        ("data.eval.Path=a", "data.eval.Path", "path"),
        ("warmup.data={path: a, pth: b}", "warmup.data.pth", "path"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override, wrong, right):
    with pytest.raises(UserError) as error:
        load_recipe(TINY, [override])
    assert str(error.value) == f"{TINY}: unknown key '{wrong}': did you mean '{right}'?"


def test_a_key_with_none_near_is_answered_with_the_known_ones():
    assert nearest("zzz", ["path", "name"]) == ": known are path, name."


def test_a_recipe_with_none_of_its_name_is_answered_with_the_nearest(tmp_path):
    write(tmp_path / "tiny_arith.yaml", "")
    with pytest.raises(UserError, match=r"did you mean .*/tiny_arith\.yaml\?"):
        load_recipe(tmp_path / "tiny_arit.yaml")
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path / "other.yaml")
    assert str(error.value) == f"There is no recipe {tmp_path}/other.yaml."


def test_a_missing_key_is_named(tmp_path):
    file = write(tmp_path / "r.yaml", "model: {path: a}\ndata: {train: {path: b}}\nrewards: [{function: c}]\n")
    with pytest.raises(UserError, match="the key 'output_dir' is missing"):
        load_recipe(file)
