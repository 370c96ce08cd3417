"""The one error of this project. It stands alone, so that nobody needs MuJoCo to raise it."""


class InputError(ValueError):
    """A flag, a file or an environment that cannot be used.

    Scripts print its one sentence and exit with code 2.
    """

    def __init__(self, sentence):
        # What the sentence quotes from a file may be long, may have several lines, and may hold
        # commands for the terminal.
        text = " ".join(str(sentence)[:500].split())
        super().__init__("".join(c if c.isprintable() else "?" for c in text))
