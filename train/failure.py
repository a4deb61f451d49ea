"""How a training ends before its last step, each as one line and an exit code of its own."""

REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again."""


class TrainingFailed(Exception):
    """It cannot go on. The text is the one line to print: what, where, what would do."""

    exit_code = 1


class Preempted(TrainingFailed):
    """Somebody asked it to stop; everything up to here is saved."""

    exit_code = REQUEUE
