"""The errors of this package: each message is one sentence that names what is wrong and what was expected."""


class AlexNetError(Exception):
    """Base class. The command line prints the message without a traceback and ends with `exit_code`."""

    exit_code = 1


class RecipeError(AlexNetError, ValueError):
    """A recipe, key or value that does not exist or does not fit; the message lists what does."""

    exit_code = 2


class DataError(AlexNetError):
    """A file or folder is missing, damaged or laid out differently than expected; the message names it."""
