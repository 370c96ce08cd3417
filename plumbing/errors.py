"""The error of everything that a user can put right."""


class InputError(ValueError):
    """A flag, a file or an environment that can not be used. Scripts print its one sentence and exit with code 2."""

    def __init__(self, sentence):
        words = " ".join(
            str(sentence)[:500].split()
        )  # what it quotes from a file may be long, or have lines,
        super().__init__(
            "".join(c if c.isprintable() else "?" for c in words)
        )  # or commands for the terminal
