"""What all trainings share: run directory, session, metrics, checkpoints, signals, console, plots, report."""

from tokenrl.names import lazily

__getattr__, __dir__ = lazily(__name__)
