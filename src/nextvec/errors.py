"""Errors that are the user's to mend: one sentence with the rule, the value and the fix."""


class UserError(ValueError):
    """Bad input, config or file. The command line prints its text alone and exits with status 2."""


class ConfigError(UserError):
    """A config key or value is wrong; the text names the key, the rule and the nearest good name."""


class DataError(UserError):
    """A corpus, shard, tokenizer or checkpoint is missing, damaged or does not match."""
