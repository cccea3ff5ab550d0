"""When a row has ended: at an EOS, or with the token that completes a stop string."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridge_rl.errors import UserError
from bridge_rl.rollout.request import Row
from bridge_rl.rollout.sampling import SamplingParams, ids_of


class Ending:
    """Which of the tokens just drawn end their rows."""

    def __init__(
        self, model: PreTrainedModel, params: SamplingParams, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        if params.stop_strings and not hasattr(tokenizer, "batch_decode"):
            raise UserError("stop_strings need a tokenizer: pass tokenizer=.")
        self.eos = torch.tensor(eos_token_ids(model, params), dtype=torch.long, device=model.device)
        self.stop_strings, self.tokenizer = tuple(params.stop_strings), tokenizer
        # Each token adds at least a byte; one more on the left keeps a decoder's first-word rules out.
        self.tail = max((len(stop.encode()) for stop in self.stop_strings), default=0) + 1

    @property
    def needs_host(self) -> bool:
        """Whether a row's text must be known, so that each step waits for the last."""
        return bool(self.stop_strings)

    def stopped(self, tokens: Tensor, rows: Sequence[Row]) -> Tensor:
        """bool [R], for `tokens` [R] drawn by `rows`."""
        stopped = (tokens[:, None] == self.eos).any(dim=-1)
        if self.stop_strings:
            assert self.tokenizer is not None
            ids = [[*row.tokens[-self.tail :], token] for row, token in zip(rows, tokens.tolist(), strict=True)]
            # Text, not transformers' StopStringCriteria: that takes only tokenizers that know the letters a to f.
            texts = self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
            ends = [any(stop in text for stop in self.stop_strings) for text in texts]
            stopped = stopped | torch.tensor(ends, device=tokens.device)
        return stopped


def eos_token_ids(model: PreTrainedModel, params: SamplingParams) -> list[int]:
    """Those of `params`, else of the model's generation config; empty: every row runs to its limit."""
    eos = params.eos_token_id
    if eos is None:
        eos = model.generation_config.eos_token_id
    return list(map(int, ids_of(eos)))
