"""The W&B dashboard of a project, as code: which panels show which of the metrics that training logs.

A new name in `report.names` belongs into `sections`; the tests compare every panel with what a run logs.
"""

import json
from pathlib import Path
from typing import Any

from bridge_rl.errors import UserError
from bridge_rl.report import names
from bridge_rl.report.labels import METRICS
from bridge_rl.report.tracking import has_key

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ModuleNotFoundError as error:
    raise UserError(
        f"The W&B dashboard needs a package that is not installed ({error.name}): "
        "pip install 'wandb-workspaces>=0.4.13,<0.5'."
    ) from error

VIEW_NAME = "Bridge RL"
# Not W&B's own step, which starts again when an offline run is resumed.
STEP = names.in_tracker("global_step")


def save_workspace(
    project: str,
    entity: str | None = None,
    dry_run: bool = False,
    path: Path = Path("wandb_workspace.json"),
) -> str:
    """Save a new view of `project` in W&B; with `dry_run`, or without an API key, write its definition to `path`.

    entity: None is the key's default. Returns the sentence that says what was done; raises UserError if W&B refuses.
    """
    if dry_run or not has_key():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(definition(workspace(project, entity or "")), indent=2) + "\n")
        reason = "" if dry_run else " because there is no W&B API key (`wandb login`)"
        return f"The definition of the W&B view is in {path}; nothing was sent{reason}."
    import wandb

    try:
        saved = workspace(project, entity or wandb.Api().default_entity).save()
    except Exception as error:  # wandb's own, its HTTP client's and the server's: no common base
        raise UserError(
            f"W&B did not take the view of {project!r}: {' '.join(str(error).split())} (check project, entity and key)."
        ) from error
    return f"The W&B view is at {saved.url}"


def definition(view: "ws.Workspace") -> dict[str, Any]:
    """The view as W&B's server stores it. wandb-workspaces has no public function for this: pin its version."""
    content: dict[str, Any] = view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return content


def workspace(project: str, entity: str) -> "ws.Workspace":
    """The view with a section for each of what one looks at."""
    return ws.Workspace(
        name=VIEW_NAME,
        project=project,
        entity=entity,
        sections=sections(),
        settings=ws.WorkspaceSettings(x_axis=STEP),
    )


def sections() -> list["ws.Section"]:
    return [
        section(
            "Reward and loss",
            lines("reward", "reward"),
            lines("loss", "loss"),
            lines("entropy (nats)", "entropy"),
            lines("gradient norm", "grad_norm"),
            lines("completion length (tokens)", "completions/mean_length"),
            lines(
                "prompts without a signal (share)",
                "frac_reward_zero_std",
                names.PROMPT_ALL_RIGHT,
                names.PROMPT_ALL_WRONG,
            ),
            lines("updates skipped", names.SKIPPED),
        ),
        section("Groups", lines("share of groups", names.ALL_RIGHT, names.ANY_RIGHT)),
        section(
            "Width sweep",
            *(one_each(METRICS[metric], f"eval_{metric}", "w") for metric in names.EVALUATION),
        ),
        section(
            "Rollout",
            lines("KL of recomputed from sampled log-probs (nats a token)", names.RECOMPUTE_KL),
            lines("rows cut at the limit (share)", names.ROLLOUT_TRUNCATED),
            lines("rows per decode step", names.ROLLOUT_ROWS_PER_STEP),
            lines("cache (tokens)", names.ROLLOUT_CACHE_TOKENS),
            lines("groups started again", names.ROLLOUT_PREEMPTED),
        ),
        section(
            "Bridge",
            lines("norm of what is added / of what it is added to", names.NORM_RATIO),
            one_each("the same, by layer", names.NORM_RATIO, "layer_"),
        ),
        section(
            "Time",
            lines(
                "share of a step", names.STEP_ROLLOUT, names.STEP_REWARD, names.STEP_UPDATE, plot_type="stacked-area"
            ),
            lines("seconds", names.STEP_SECONDS, names.ROLLOUT_SECONDS, names.REWARD_SECONDS),
            lines(
                "tokens/s",
                names.STEP_TOKENS_PER_SECOND,
                names.UPDATE_TOKENS_PER_SECOND,
                names.ROLLOUT_TOKENS_PER_SECOND,
            ),
        ),
        section(
            "Dynamic sampling",
            lines("prompts a generation batch", names.DYNAMIC_SAMPLED, names.DYNAMIC_DROPPED, names.DYNAMIC_UNFILLED),
            lines("further rounds", names.DYNAMIC_ROUNDS),
            lines("reward before and after", names.DYNAMIC_REWARD, "reward"),
        ),
        section("Memory", lines("peak (GiB)", names.PEAK_MEMORY)),
        section("Completions", wr.WeavePanelSummaryTable(table_name=names.COMPLETIONS, layout=wr.Layout(w=24, h=16))),
    ]


def section(name: str, *panels: Any) -> "ws.Section":
    return ws.Section(name=name, panels=list(panels), is_open=True)


def lines(title: str, *metrics: str, **options: Any) -> "wr.LinePlot":
    """Metrics by their names in the log history, over training steps."""
    return wr.LinePlot(title=title, x=STEP, y=[names.in_tracker(metric) for metric in metrics], **options)


def one_each(title: str, metric: str, of: str) -> "wr.LinePlot":
    """One line for each layer of the model, or each width of its evaluations, however many a run logs."""
    return wr.LinePlot(title=title, x=STEP, metric_regex=rf"^{names.in_tracker(metric)}/{of}\d+$")
