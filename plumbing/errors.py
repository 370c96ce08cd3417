"""The one error of this project. It stands alone, so that nobody needs MuJoCo to raise it."""

import traceback


class InputError(ValueError):
    """A flag, a file or an environment that cannot be used.

    Scripts print its one sentence and exit with code 2.
    """

    def __init__(self, sentence):
        # What the sentence quotes from a file may be long, may have several lines, and may hold
        # commands for the terminal.
        text = " ".join(str(sentence)[:500].split())
        super().__init__("".join(c if c.isprintable() else "?" for c in text))


def called_exit(error) -> str:
    """Where a SystemExit comes from, and what it means, in words."""
    places = traceback.extract_tb(error.__traceback__)
    # `exit()` and `quit()` are functions of a module of Python's: it is their caller that matters.
    places = [place for place in places if "_sitebuiltins" not in place.filename]
    where = f"{places[-1].filename}, line {places[-1].lineno}"
    return f"{where}, called sys.exit({error.code!r}), so that the run did not end"
