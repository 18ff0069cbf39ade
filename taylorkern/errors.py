"""The error of a command that can't do what was asked for."""


class CommandError(RuntimeError):
    """What the user asked for can't be done; the message says why and what to do."""


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, or its kind where it has none.

    >>> one_line(ValueError("no\\n  good"))
    'no good'
    """
    return " ".join(str(error).split()) or type(error).__name__


def listing(names: list[str], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are.

    >>> listing(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
