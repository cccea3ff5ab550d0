"""Make a base of the embedded tasks again: `python -m bridge_rl.tiny.make_base two_tries --output DIR --stop-at 0.245`.

Supervised training from scratch on the task's demonstrations, on a GPU if there is one; on a CPU 5 to 40 minutes. It
stops as soon as pass@1 at temperature 1 on held-out problems reaches `--stop-at`.
"""

import argparse
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bridge_rl.tiny import checked_products, equations, products, word_problems
from bridge_rl.tiny import task as two_tries

# What is one token: a word, or another character. A number is as many tokens as it has digits.
TOKEN = r"[A-Za-z]+|\S"
SOLVED_WITH = "0123456789+-*=;"  # word problems
TRAIN_SEED, EVAL_SEED = 1, 2


@dataclass(frozen=True)
class Task:
    """What a base is trained on. make_problems, make_held_out: seed -> endless problems, with their `text`.

    vocabulary: every token of problems and solutions. max_length: the model's, in tokens. is_learned: of each token of
    a demonstration; None: all are.
    """

    vocabulary: Callable[[], Sequence[str]]
    make_problems: Callable[[int], Iterator[Any]]
    make_held_out: Callable[[int], Iterator[Any]]
    demonstrate: Callable[[Any, random.Random], str]
    is_correct: Callable[[Any, str], bool]
    max_length: int = 128
    max_new_tokens: int = 26
    is_learned: Callable[[Any, str], list[bool]] | None = None


def word_problem_vocabulary() -> list[str]:
    """What solutions are written with, and every word and mark of many problems: templates and names are few."""
    problems = islice(word_problems.make_problems(TRAIN_SEED), 20_000)
    found = {token for problem in problems for token in re.findall(TOKEN, problem.text)}
    return [*SOLVED_WITH, *sorted(found - set(SOLVED_WITH))]


PRODUCTS = Task(
    vocabulary=lambda: products.CHARACTERS,
    make_problems=products.make_problems,
    make_held_out=partial(products.make_problems, split="validation"),
    demonstrate=products.demonstrate,
    is_correct=lambda problem, completion: equations.is_correct(str(problem.product), completion),
)
TASKS = {
    "two_tries": Task(
        vocabulary=lambda: two_tries.CHARACTERS,
        make_problems=two_tries.make_problems,
        make_held_out=two_tries.make_problems,
        demonstrate=two_tries.demonstrate,
        is_correct=lambda problem, completion: two_tries.is_correct(problem.text, completion),
    ),
    "products": PRODUCTS,
    "checked_products": replace(
        PRODUCTS,
        vocabulary=lambda: checked_products.CHARACTERS,
        demonstrate=checked_products.demonstrate,
        max_new_tokens=44,
        is_learned=checked_products.is_learned,
    ),
    "word_problems": Task(
        vocabulary=word_problem_vocabulary,
        make_problems=word_problems.make_problems,
        make_held_out=partial(word_problems.make_problems, split="validation"),
        demonstrate=word_problems.demonstrate,
        is_correct=lambda problem, completion: equations.is_correct(str(problem.answer), completion),
        max_length=256,
        max_new_tokens=80,
    ),
}
# A user turn is the problem; the model answers after "=". One assistant turn ends with EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + message['content'] + '=' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One token per `TOKEN`, with PAD, BOS and EOS. White space is lost."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *task.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=task.max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and MLPs twice as wide as it is."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: str) -> list[int]:
    """Token ids of the user turn."""
    turn = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)


def batches(task: Task, tokenizer: PreTrainedTokenizerFast, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input_ids, labels), both [size, T] and padded at the end, where no label is and nothing attends to."""
    rng = random.Random(TRAIN_SEED)
    problems = task.make_problems(TRAIN_SEED)
    while True:
        rows, labels = [], []
        for _ in range(size):
            problem = next(problems)
            prompt = prompt_ids(tokenizer, problem.text)
            solution = task.demonstrate(problem, rng)
            completion = tokenizer(solution)["input_ids"]
            learned = [True] * len(completion) if task.is_learned is None else task.is_learned(problem, solution)
            rows.append([*prompt, *completion, tokenizer.eos_token_id])
            labels.append(
                [-100] * len(prompt)
                + [token if learn else -100 for token, learn in zip(completion, learned, strict=True)]
                + [tokenizer.eos_token_id]
            )
        yield padded(rows, tokenizer.pad_token_id), padded(labels, -100)


def padded(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """[rows, longest] with `value` in the empty places at `side`."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


@torch.no_grad()
def pass_at_1(task: Task, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int) -> float:
    """Share of right completions, one sample a problem at temperature 1."""
    problems = task.make_held_out(EVAL_SEED)
    chosen = [next(problems) for _ in range(num_problems)]
    inputs = padded([prompt_ids(tokenizer, problem.text) for problem in chosen], tokenizer.pad_token_id, side="left")
    torch.manual_seed(0)
    output = model.generate(
        inputs.to(model.device),
        attention_mask=(inputs != tokenizer.pad_token_id).long().to(model.device),
        do_sample=True,
        top_k=0,
        max_new_tokens=task.max_new_tokens,
    )
    texts = tokenizer.batch_decode(output[:, inputs.shape[1] :], skip_special_tokens=True)
    return sum(task.is_correct(p, text) for p, text in zip(chosen, texts, strict=True)) / num_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stop-at", type=float, default=0.25, help="pass@1 at which to stop")
    parser.add_argument("--check-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--max-steps", type=int, default=12000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is found before the training

    torch.manual_seed(args.seed)
    task = TASKS[args.task]
    tokenizer = make_tokenizer(task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(tokenizer, args.hidden_size, args.layers, args.heads).to(device)
    print(f"{model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=200)
    start = time.perf_counter()
    for step, (input_ids, labels) in enumerate(batches(task, tokenizer, args.batch_size), start=1):
        loss = model(input_ids=input_ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if step % args.check_every == 0 or step == args.max_steps:
            model.eval()
            accuracy = pass_at_1(task, model, tokenizer, 1024)
            model.train()
            minutes = (time.perf_counter() - start) / 60
            print(f"step {step} loss {loss.item():.3f} pass@1 {accuracy:.3f} {minutes:.1f} min", flush=True)
            if accuracy >= args.stop_at or step == args.max_steps:
                break
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
