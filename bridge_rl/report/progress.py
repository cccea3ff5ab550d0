"""Progress bars: one for training that shows the reward, one for everything that only counts."""

from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bridge_rl.report import names

SHOWN = {"loss": "loss", "reward": "reward", names.ALL_RIGHT: "all right", names.ANY_RIGHT: "any right"}


class Bar(tqdm):
    """A bar that only the main process of a machine shows."""

    def __init__(self, description: str, total: int) -> None:
        super().__init__(desc=description, total=total, disable=not PartialState().is_local_main_process)


class RewardProgress(TrainerCallback):
    """Steps, time left, and the latest reward and group metrics."""

    def __init__(self, description: str = "training") -> None:
        self.description = description
        self.bar: Bar | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = Bar(self.description, state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.bar is not None
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        shown = {label: f"{logs[name]:.3f}" for name, label in SHOWN.items() if isinstance(logs.get(name), float)}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
