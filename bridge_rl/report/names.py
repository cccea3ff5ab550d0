"""Every metric name that is ours, in one place; TRL's own keep TRL's names.

The trainer's log history has training metrics as written here and evaluation ones with `eval_` before them; in W&B
transformers makes that `train/...` and `eval/...`. Times and rates of sampling and scoring are those of rank 0.
"""

ALL_RIGHT = "group/all_right"  # share of groups all of whose rows are right
ANY_RIGHT = "group/any_right"  # share of groups with a right row: coverage
ROLLOUT_SECONDS = "rollout/seconds"  # sampling, per generation batch
ROLLOUT_TOKENS_PER_SECOND = "rollout/tokens_per_second"  # completion tokens of this rank
ROLLOUT_TRUNCATED = "rollout/truncated"  # share of this rank's rows cut at the limit
ROLLOUT_ROWS_PER_STEP = "rollout/rows_per_step"  # rows running, on average over this rank's decode steps
ROLLOUT_CACHE_TOKENS = "rollout/peak_cache_tokens"  # most tokens that pages of this rank's cache had room for at once
ROLLOUT_PREEMPTED = "rollout/preempted"  # groups of this rank that had to start again for want of cache
RECOMPUTE_KL = "rollout/recompute_kl"  # of the trainer's log-probs from those of sampling; near 0 unless broken
REWARD_SECONDS = "reward/seconds"  # scoring, per generation batch

TRAIN = (
    ALL_RIGHT,
    ANY_RIGHT,
    ROLLOUT_SECONDS,
    ROLLOUT_TOKENS_PER_SECOND,
    ROLLOUT_TRUNCATED,
    ROLLOUT_ROWS_PER_STEP,
    ROLLOUT_CACHE_TOKENS,
    ROLLOUT_PREEMPTED,
    RECOMPUTE_KL,
    REWARD_SECONDS,
)


def evaluation(metric: str, width: int) -> str:
    """Name of a metric of `evaluation.metrics.set_metrics` at a width, such as `eval_pass@1/w4`."""
    return f"eval_{metric}/w{width}"
