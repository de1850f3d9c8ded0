"""The settings of every command: YAML groups that Hydra composes, the types and checks of the result, and the objects
that it describes."""
