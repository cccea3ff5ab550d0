"""The embedded default: a tiny Llama, its character tokenizer and the two-tries arithmetic task."""

from bridge_rl.tiny.task import Problem, is_correct, make_problems

__all__ = ["Problem", "is_correct", "make_problems"]
