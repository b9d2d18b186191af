"""The one error that a user's input may cause, and its milder relatives."""


class ConfigError(ValueError):
    """A value that the user gave cannot work.

    The message is one line: it names the value, says what was expected and how to mend it. The entry points print it
    without a traceback and exit with status 2.
    """


class EvomoeWarning(UserWarning):
    """Something that works, but hardly as the user meant it; the entry points print it without a line of code."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite; the optimizer step that would have spread it was not taken."""
