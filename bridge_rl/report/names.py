"""Every metric name that is ours, in one place; TRL's own keep TRL's names.

The trainer's log history has training metrics as written here and evaluation ones with `eval_` before them; in W&B
transformers makes that `train/...` and `eval/...`. Times, rates and memory are those of rank 0.
"""

ALL_RIGHT = "group/all_right"  # share of groups all of whose rows are right
ANY_RIGHT = "group/any_right"  # share of groups with a right row: coverage
PROMPT_ALL_RIGHT = "prompt/all_right"  # share of prompts all of whose rows, over all their groups, are right
PROMPT_ALL_WRONG = "prompt/all_wrong"  # neither has a signal; TRL's `frac_reward_zero_std` is the share without any
ROLLOUT_SECONDS = "rollout/seconds"  # sampling, per generation batch
ROLLOUT_TOKENS_PER_SECOND = "rollout/tokens_per_second"  # completion tokens of this rank
ROLLOUT_TRUNCATED = "rollout/truncated"  # share of this rank's rows cut at the limit
ROLLOUT_ROWS_PER_STEP = "rollout/rows_per_step"  # rows running, on average over this rank's decode steps
ROLLOUT_CACHE_TOKENS = "rollout/peak_cache_tokens"  # most tokens that pages of this rank's cache had room for at once
ROLLOUT_PREEMPTED = "rollout/preempted"  # groups of this rank that had to start again for want of cache
RECOMPUTE_KL = "rollout/recompute_kl"  # of the trainer's log-probs from those of sampling; near 0 unless broken
REWARD_SECONDS = "reward/seconds"  # scoring, per generation batch
SKIPPED = "guards/skipped_steps"  # so far, for a loss or gradient that was not finite
STEP_SECONDS = "step/seconds"  # of an optimizer step: rollout, reward and update; not evaluations and saves
STEP_ROLLOUT = "step/rollout_share"  # of the time of the steps since the last log; the three shares make 1
STEP_REWARD = "step/reward_share"
STEP_UPDATE = "step/update_share"  # the rest: loss, gradients, optimizer, reference
STEP_TOKENS_PER_SECOND = "step/tokens_per_second"  # prompt and completion tokens of the loss over the time of a step
UPDATE_TOKENS_PER_SECOND = "update/tokens_per_second"  # the same tokens over the time of the update
PEAK_MEMORY = "memory/peak_gib"  # GiB: CUDA's most allocated since the start; on CPU the process's resident size
NORM_RATIO = "bridge/norm_ratio"  # norm of what a block adds over that of what it is added to: mean of all blocks

# With `rollout.dynamic_sampling`, of all ranks, per generation batch. What is right or wrong is then said of the batch
# as it was first sampled, `reward` and `frac_reward_zero_std` of the one that is trained on.
DYNAMIC_SAMPLED = "dynamic/prompts_sampled"
DYNAMIC_DROPPED = "dynamic/prompts_dropped"  # sampled and not trained on
DYNAMIC_UNFILLED = "dynamic/prompts_without_signal"  # trained on all the same, for want of others
DYNAMIC_ROUNDS = "dynamic/rounds"  # of further prompts
DYNAMIC_REWARD = "dynamic/reward_before"  # mean reward of the batch as it was first sampled
DYNAMIC = (DYNAMIC_SAMPLED, DYNAMIC_DROPPED, DYNAMIC_UNFILLED, DYNAMIC_ROUNDS, DYNAMIC_REWARD)

TRAIN = (
    ALL_RIGHT,
    ANY_RIGHT,
    PROMPT_ALL_RIGHT,
    PROMPT_ALL_WRONG,
    ROLLOUT_SECONDS,
    ROLLOUT_TOKENS_PER_SECOND,
    ROLLOUT_TRUNCATED,
    ROLLOUT_ROWS_PER_STEP,
    ROLLOUT_CACHE_TOKENS,
    ROLLOUT_PREEMPTED,
    RECOMPUTE_KL,
    REWARD_SECONDS,
    SKIPPED,
    STEP_SECONDS,
    STEP_ROLLOUT,
    STEP_REWARD,
    STEP_UPDATE,
    STEP_TOKENS_PER_SECOND,
    UPDATE_TOKENS_PER_SECOND,
    PEAK_MEMORY,
    NORM_RATIO,
)
# Of `evaluation.metrics`, at every width: what evaluations in a run log.
EVALUATION = ("pass@1", "maj", "any", "all")
COMPLETIONS = "completions"  # TRL's table, a row each completion, with its group; needs `training.log_completions`


def norm_ratio(layer: int) -> str:
    """Name of the norm ratio of one layer's block."""
    return f"{NORM_RATIO}/layer_{layer}"


def evaluation(metric: str, width: int) -> str:
    """Name of a metric of `evaluation.metrics` at a width, such as `eval_pass@1/w4`."""
    return f"eval_{metric}/w{width}"


def in_tracker(name: str) -> str:
    """The key under which transformers hands an entry of the log history to W&B, TensorBoard and trackio."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
