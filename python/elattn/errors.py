"""The mistakes of a user that the command line reports in one line."""

__all__ = ["UserError"]


class UserError(Exception):
    """Something the user can put right; the message says how."""
