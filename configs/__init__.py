"""The settings of every command: YAML groups that Hydra composes, checks on the result, and what it builds."""
