"""Commands beside train.py. Each composes a config and calls the packages that do the work."""
