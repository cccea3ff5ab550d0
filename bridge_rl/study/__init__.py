"""A study: arms x seeds x tasks, each cell a training and an evaluation, and what they say together."""
