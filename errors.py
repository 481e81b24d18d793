"""What a user got wrong, said in one line."""


class UserError(ValueError):
    """One line with the value, the rule and the remedy.

    Entry points print it and end with status 2 (`endings.run_command`).
    """


def reason_of(error):
    """The first line of what an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
