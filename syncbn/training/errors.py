"""Errors that end a run with one line."""


class SettingError(ValueError):
    """A setting that cannot work. The message names it, its value, and what would work, in one line."""


class AgreedError(SettingError):
    """One that every rank raises, so that one of them says it."""
