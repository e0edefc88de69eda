"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Something the user can put right: one sentence that names the file or key, what is wrong and what to do.

    The command line prints the sentence alone and exits with 1; the traceback goes to the run's log.
    """
