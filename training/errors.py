"""What ends a training run early.

TrainingError
├── TrainingStopped     a signal; the run was saved and goes on when it is started again
├── WorkDirError        the work directory belongs to another run: take another one, or empty it
└── DivergedError       the loss is no number: change the settings
"""


class TrainingError(Exception):
    """Root of this tree."""


class TrainingStopped(TrainingError):
    """A signal ended the run after a step, and that step was saved."""


class WorkDirError(TrainingError):
    """The work directory holds a run with other settings."""


class DivergedError(TrainingError):
    """The loss or the gradient is no number."""
