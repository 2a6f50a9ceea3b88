"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake or a condition the user can mend: one sentence saying what, where and what to do.

    The program prints the sentence once (not once per rank), without a traceback, and exits with status 2.
    """
