"""What a command cannot do, in words for its user."""

from __future__ import annotations


class Problem(Exception):
    """Its text is the message; the command ends with exit code 2."""
