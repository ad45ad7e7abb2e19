"""The errors a user can meet, each with the exit code that scripts and Slurm jobs rely on.

Every message is one line that quotes the offending name, says what it must be and what it was.
`python -m pretrain` and `python -m finetune` print the message and exit with `exit_code`; anything
else is a bug and keeps its traceback.
"""

import errno

# What makes a failed write the fault of the disk: full, over quota, read-only, beyond the size a file may have.
DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
# Of these, what passes once somebody makes room.
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
# What taking a lock ends in on a file system that has none.
NO_LOCK_ERRNOS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_CONFIG = 3
EXIT_DATA = 4
EXIT_CHECKPOINT = 5
EXIT_DISK = 6
EXIT_NON_FINITE = 7
EXIT_REQUEUE = 85


class ParlanceError(Exception):
    """Base of every error with a documented exit code.

    shared: True where every rank raises this error, so that rank 0 alone prints it.
    """

    exit_code = 1
    shared = False


class UsageError(ParlanceError):
    """The command line itself is wrong."""

    exit_code = EXIT_USAGE


class ConfigError(ParlanceError):
    """A configuration value is unknown, of the wrong type, out of range or in conflict."""

    exit_code = EXIT_CONFIG


class DataError(ParlanceError):
    """A source, shard, manifest, tokenizer or input file is missing, empty, broken or mismatched."""

    exit_code = EXIT_DATA


class CheckpointError(ParlanceError):
    """A checkpoint or bundle is missing, incomplete, corrupt or of another architecture."""

    exit_code = EXIT_CHECKPOINT


class DiskError(ParlanceError):
    """Writing failed because the disk is full, over quota or read-only."""

    exit_code = EXIT_DISK


class DiskFullError(DiskError):
    """The disk is full or over quota, which may pass: `train.disk_patience` waits for it."""


class NonFiniteError(ParlanceError):
    """A loss term, gradient, weight or moment was not finite; the state that saw it is never committed.

    samples: (first, count) of the update in the global order, where the loop knows it.
    """

    exit_code = EXIT_NON_FINITE
    samples: tuple[int, int] | None = None


class LossSpike(NonFiniteError):
    """A loss was finite, and many times what it had been."""


class Requeue(ParlanceError):
    """A stop signal arrived and the state is saved: run the same command again to continue."""

    exit_code = EXIT_REQUEUE


class LostRank(Requeue):
    """A rank died, was stopped or stands still, so that the others would wait for ever."""
