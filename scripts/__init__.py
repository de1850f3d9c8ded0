"""Commands beside train.py; each is thin: it composes a config and calls the rooms that do the work."""
