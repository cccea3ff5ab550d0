"""What tests of the trainer share: options of a run on CPU that writes nothing, prompts and a reward with a signal."""

from trl import GRPOConfig

PROMPTS = [f"<bos>{n}{n}:{m}=" for n in range(4) for m in ("1", "22", "333")]  # for the embedded tokenizer


def reward_of_tokens(completion_ids, **kwargs):
    """Right when the first token is even."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def quiet_config(directory, **options) -> GRPOConfig:
    """Eight completions a prompt of at most eight tokens, two prompts an update, unless `options` say otherwise."""
    defaults = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
    }
    return GRPOConfig(**{**defaults, **options})
