"""What ends a command with a message."""


class CommandError(Exception):
    """Printed to standard error; the command exits with status 1."""
