"""Evaluation of sets of answers."""
