"""The exceptions that are meant for a person, and how to find one inside what Ray raises."""

import re

#: exit statuses for a UserError: of wrong input, and of what may pass (EX_TEMPFAIL of sysexits.h)
WRONG_INPUT, TRY_AGAIN = 2, 75


class UserError(ValueError):
    """Wrong input: the message names the file or key, what was found, what was expected and what to do.

    The command line prints it as one sentence and exits with WRONG_INPUT; any other exception is a defect of ours
    and keeps its traceback. passing: it may be over when the same is tried again, and the exit status is TRY_AGAIN.
    superseded: somebody else goes on with the run.
    """

    passing = False
    superseded = False


class RunStopped(Exception):
    """Training was asked to stop and did; what it had done is committed, or the message says what is.

    exit_code: of the process, 128 + the signal's number.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def find_user_error(error: BaseException) -> UserError | None:
    """The first UserError among an error and its causes; Ray wraps what a worker or task raised several times.

    Of an error in a data task Ray keeps the traceback's text alone, so that is searched last.
    """
    pending: list[BaseException | None] = [error]
    seen: dict[int, BaseException] = {}
    while pending:
        found = pending.pop(0)
        if found is None or id(found) in seen:
            continue
        seen[id(found)] = found
        if isinstance(found, UserError):
            error = UserError(str(found))
            error.passing, error.superseded = found.passing, found.superseded
            return error
        pending += [found.__cause__, found.__context__, getattr(found, "cause", None)]
        pending.append(getattr(found, "controller_failure", None))
        pending += list(getattr(found, "worker_failures", {}).values())
    for found in seen.values():
        told = re.search(r"ray_pipeline\.(?:errors\.User|storage\.(Storage))Error: (.*)", str(found))
        if told:
            error = UserError(told[2])
            error.passing = told[1] is not None
            return error
    return None
