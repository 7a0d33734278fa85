"""The one exception that is meant for a person."""


class UserError(ValueError):
    """Wrong input: the message names the file or key, what was found, what was expected and what to do.

    The command line prints it as one sentence and exits non-zero; any other exception is a defect of ours
    and keeps its traceback.
    """
