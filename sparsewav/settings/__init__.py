"""The options of every group and the configuration of a run: dataclasses with defaults and checks."""
