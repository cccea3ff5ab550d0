"""`bridge`, a model of lm-evaluation-harness: the `repeats` of a document are sampled as groups that think together.

    bridge-rl lm-eval --model bridge --model_args pretrained=CHECKPOINT,width=4 --tasks TASK --batch_size 64

is lm_eval's own command line with one model more. lm_eval 0.4.13 looks for models in its own package only; releases
after it find this one by the entry point `lm_eval.models`, and then `lm_eval --model bridge ...` is the same.

A task needs `repeats`, a multiple of the width, and a filter that keeps more than the first row, as lm_eval's default
does not (see recipes/lm_eval/two_tries.yaml). For the same prompts, limits, seed and order of problems, and without
stop strings, the completions are those of `bridge-rl eval`: a document's place (with `--samples`, among those chosen)
is its problem's.
Deviations from lm_eval's model `hf`: `batch_size` counts rows, and at least one whole group runs; sampling is steered
by the request alone, not by the model's generation_config; generation arguments without effect are refused. Likelihoods
are those of single rows (width 1): a request to score has no siblings.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from tqdm import tqdm

from bridge_rl.cli import run_command
from bridge_rl.config import ModelSection
from bridge_rl.errors import UserError, check_kind
from bridge_rl.evaluation.run import eos_ids, group_index, listens
from bridge_rl.models import load_model, load_tokenizer, model_config
from bridge_rl.rollout import Rollout, RolloutOptions, SamplingParams
from bridge_rl.rollout.sampling import stream_seed
from bridge_rl.surgery import has_bridge

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM, eval_logger
    from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import warning_once
except ModuleNotFoundError as error:
    raise UserError(f"bridge-rl lm-eval needs {error.name}: pip install -e '.[lm-eval]' in the clone") from error

# What HFLM takes and does not ask of a model that it has not loaded itself.
PASSED_ON = {"add_bos_token", "chat_template_args", "max_batch_size", "max_length"}
WITHOUT_EFFECT = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0}  # served at these values only
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm_eval's names of one thing
NUMBERS: dict[str, type] = {"temperature": Real, "top_p": Real, **dict.fromkeys(("top_k", "seed", *LIMITS), int)}


@dataclass(frozen=True)
class GroupRequest:
    """One group to sample. index: of its draws."""

    context: str
    settings: dict[str, Any]
    width: int
    index: int


def split_requests(requests: Sequence[Instance], width: int | None) -> list[GroupRequest]:
    """The groups that lm_eval's requests, each as often in a row as its `repeats`, ask for, in their order.

    `width` None: all repeats of a document are one group. Raises UserError for repeats that are not whole groups.
    """
    groups = []
    place = 0
    while place < len(requests):
        request = requests[place]
        repeats = request.repeats
        if repeats % (width or repeats) != 0:
            raise UserError(
                f"task {request.task_name} has repeats {repeats}, which are not whole groups of width {width}: write a "
                f"multiple such as `repeats: {width}` into its YAML, or leave width out of --model_args."
            )
        copies = requests[place : place + repeats]
        assert len(copies) == repeats, "lm_eval has split the repeats of a document"
        assert all(copy is request for copy in copies), "lm_eval has split the repeats of a document"
        wide = width or repeats
        context, settings = request.args
        for number in range(repeats // wide):
            groups.append(GroupRequest(context, settings, wide, group_index(request.doc_id, number)))
        place += repeats
    return groups


@register_model("bridge")
class BridgeLM(HFLM):
    """A model with a Bridge, or any causal LM, whose completions of one document are groups of `width`."""

    def __init__(
        self,
        pretrained: str | None = None,
        width: int | None = None,
        seed: int = 0,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        """`pretrained`: checkpoint, hub id or `package://NAME/PATH`. `width` None: that of each task's repeats.

        `batch_size`: rows at once, `auto` for as many as memory holds. `others`: those of PASSED_ON, as HFLM has them.
        Raises UserError for an argument that is not served or has no such value, and without `pretrained`.
        """
        if unknown := sorted(others.keys() - PASSED_ON):
            known = ["batch_size", "device", "dtype", "pretrained", "revision", "seed", "trust_remote_code", "width"]
            raise UserError(
                f"--model_args {unknown[0]} is not served by bridge: use {', '.join(sorted([*known, *PASSED_ON]))}."
            )
        if width is not None and (not isinstance(width, int) or width < 1):
            raise UserError(f"--model_args width is {width!r}: it must be a whole number of at least 1.")
        if pretrained is None:
            raise UserError("--model_args names no model: write pretrained=CHECKPOINT into it.")
        check_kind("--model_args seed", seed, int)
        if seed < 0:
            raise UserError(f"--model_args seed is {seed}: it must not be negative.")
        if "max_length" in others:
            check_kind("--model_args max_length", others["max_length"], int)
        if not re.fullmatch(r"auto(:\d+)?|0*[1-9]\d*", str(batch_size)):
            raise UserError(f"--batch_size is {batch_size}: use a whole number of at least 1, or auto.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # On the command line lm_eval says cuda:0 by default, also where there is no GPU.
        dtype = dtype or ("bfloat16" if torch.cuda.is_available() and device.startswith("cuda") else "float32")
        if dtype not in ("bfloat16", "float32"):
            raise UserError(f"--model_args dtype is {dtype}: use bfloat16 or float32.")
        self.section = ModelSection(
            pretrained,
            revision=revision,
            dtype=dtype,  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code,
        )
        self.width, self.seed = width, seed
        super().__init__(pretrained, revision=revision or "main", device=device, batch_size=batch_size, **others)
        self.eos = tuple(eos_ids(self.model, self.tokenizer))

    # HFLM's three loaders, called by its constructor: with the Bridge, and with our names of models.

    def _get_config(self, pretrained: str, **others: Any) -> None:
        self._config = model_config(self.section)

    def _create_tokenizer(self, *args: Any, **others: Any) -> None:
        self.tokenizer = load_tokenizer(self.section)

    def _create_model(self, pretrained: str, **others: Any) -> None:
        self._model = load_model(self.section).to(self.device)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of every request, in their order, cut before the first stop string."""
        groups = split_requests(requests, self.width)
        if self.width is None and listens(self.model) and any(group.width == 1 for group in groups):
            warning_once(
                eval_logger,
                "A task has repeats 1, so that its rows run at width 1, without siblings: set `repeats` in its YAML.",
            )
        alike: dict[SamplingParams, list[int]] = {}  # places of groups
        for place, group in enumerate(groups):
            alike.setdefault(self.sampling_params(group), []).append(place)
        texts: dict[int, list[str]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Sampling groups") as bar:
            for params, places in alike.items():
                for number, rows in self.sample([groups[place] for place in places], params):
                    texts[places[number]] = rows
                    asked = groups[places[number]]
                    for text in rows:
                        self.cache_hook.add_partial("generate_until", (asked.context, asked.settings), text)
                    bar.update(len(rows))
        return [text for place in range(len(groups)) for text in texts[place]]

    def sample(self, groups: Sequence[GroupRequest], params: SamplingParams) -> Iterator[tuple[int, list[str]]]:
        """(place, texts of its rows) of each group, as they end."""
        rollout = Rollout(
            self.model,
            [self.prompt_ids(group.context, params.max_new_tokens) for group in groups],
            [group.width for group in groups],
            params,
            indices=[group.index for group in groups],
            options=RolloutOptions(max_rows=None if self.batch_size == "auto" else self.batch_size),
            tokenizer=self.tokenizer,
        )
        stops = list(params.stop_strings)
        with closing(rollout.stream()) as stream:
            for place, group in stream:
                yield place, [postprocess_generated_text(self.tok_decode(row), stops, None) for row in group.tokens]

    def prompt_ids(self, context: str, max_new_tokens: int) -> list[int]:
        """Token ids of a prompt; one that is too long loses its beginning, as with lm_eval's own models."""
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"max_gen_toks is {max_new_tokens}, but the model takes {self.max_length} tokens, prompt included: "
                "lower it, for example by --gen_kwargs max_gen_toks=..."
            )
        ids, _ = maybe_truncate(self.tok_encode(context), max_new_tokens, self.max_length)
        return ids

    def sampling_params(self, group: GroupRequest) -> SamplingParams:
        """What a group's generation arguments say. Raises UserError for one that has no effect or is no number."""
        for name, kind in NUMBERS.items():
            if name in group.settings:
                check_kind(f"generation argument {name}", group.settings[name], kind)
        settings = dict(normalize_gen_kwargs(group.settings, self.max_gen_toks))
        stops = tuple(stop for stop in settings.pop("until") if stop)
        max_new_tokens, seed = settings.pop("max_gen_toks"), settings.pop("seed", self.seed)
        sampled, temperature = settings.pop("do_sample"), settings.pop("temperature", 1.0)
        temperature = temperature if sampled else 0.0
        top_p, top_k = settings.pop("top_p", 1.0), settings.pop("top_k", 0)
        if seed < 0:
            raise UserError(f"generation argument seed is {seed}: it must not be negative.")
        for name, value in settings.items():
            if name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]:
                raise UserError(f"generation argument {name}={value} is not served by bridge: leave it out.")
        if temperature == 0 and group.width > 1:
            warning_once(
                eval_logger,
                "Greedy decoding makes the rows of a group equal: for interdependent samples set do_sample=True and a "
                "temperature in generation_kwargs or by --gen_kwargs.",
            )
        elif temperature > 0 and not group.settings.get("do_sample") and self.cache_hook.dbdict is not None:
            raise UserError(
                "--use_cache would give all repeats one completion when the task samples without saying so: add "
                "do_sample=True to its generation_kwargs."
            )
        return SamplingParams(
            max_new_tokens, temperature, top_p, top_k, stream_seed(seed, "evaluation"), self.eos, stops
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-prob, whether greedy decoding gives it) of every continuation, each a row alone."""
        self.say_width_one()
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of every text, each a row alone."""
        self.say_width_one()
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def say_width_one(self) -> None:
        if has_bridge(self.model) and self.width != 1:
            warning_once(eval_logger, "Likelihoods are of single rows: these tasks run at width 1, without siblings.")


def main(argv: Sequence[str]) -> None:
    """lm_eval's own command line, with `bridge` among its models."""
    sys.argv = ["lm_eval", *argv]  # its parser reads nothing else
    cli_evaluate()


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
