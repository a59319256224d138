"""The one exception type for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input: one sentence that names what came and what was expected.

    Library callers catch it as a `ValueError`; the command line prints the sentence without a traceback and exits with
    status 2.
    """
