"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """A value from outside is wrong: the message gives the value, the rule and the remedy.

    The command line prints it as one line and exits with status 2; nothing has been written.
    Line breaks and control characters that a quoted value brings along are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
