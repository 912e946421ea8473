"""The errors of this package: each message is one sentence that names what is wrong and what was expected."""


class AlexNetError(Exception):
    """Base class. The command line prints the message without a traceback and ends with `exit_code`."""

    exit_code = 1


class RecipeError(AlexNetError, ValueError):
    """A recipe, key or value that does not exist or does not fit; the message lists what does."""

    exit_code = 2


class DataError(AlexNetError):
    """A file or folder is missing, damaged or laid out differently than expected; the message names it."""


class ArgumentError(AlexNetError, ValueError, RuntimeError):
    """An argument of an operator or layer that does not fit. torch raises now RuntimeError, now ValueError for such:
    code that catches torch's error catches this one too."""


def sentence(error: BaseException) -> str:
    """The message of an error without the traceback that a loader's worker process puts around it."""
    text = str(error).strip() or type(error).__name__
    return text.rpartition(f"{type(error).__name__}: ")[2] if "Original Traceback" in text else text


def first_line(error: BaseException) -> str:
    return sentence(error).splitlines()[0]
