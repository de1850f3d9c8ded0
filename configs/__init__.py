"""The settings of every command: YAML groups that Hydra composes, the checks on what it composed, and what it
builds."""
