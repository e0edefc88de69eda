"""The error for what the user can correct."""


class UserError(ValueError):
    """An error that the user can correct: one sentence that names the file or key, what is wrong and what to do.

    The command line prints the sentence alone and exits with 1; the traceback is written to the run's log.
    """
