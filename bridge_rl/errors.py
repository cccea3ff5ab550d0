"""The one error for a user's mistake."""


class UserError(ValueError):
    """What is wrong, where (file and key), what to do, in one sentence. The command line prints it and exits with 2."""
