"""What can go wrong, and the exit code each kind has. Every message says what, where and what to do."""


class GptworksError(Exception):
    """A failure we foresee. `code` is the process's exit status; the message is one line for a person."""

    code = 70


class UsageError(GptworksError):
    """A wrong command, key or value."""

    code = 64


class DataError(GptworksError):
    """Data that cannot be used: empty, malformed, damaged."""

    code = 65


class StorageError(GptworksError):
    """The disk is full or the operating system refused to read or write."""

    code = 74


class Preempted(GptworksError):
    """Asked to stop (SIGTERM, Ctrl-C). The state is saved; the same command continues."""

    code = 75


class NotFinite(GptworksError):
    """A loss, gradient or weight is NaN or infinite. Nothing of it was written."""

    code = 76


class OutOfMemory(GptworksError):
    """The work does not fit into memory."""

    code = 77


class RunMismatch(GptworksError):
    """The run on disk and the configuration disagree, or another process holds the run."""

    code = 78


class PeerLost(GptworksError):
    """Another process of the run died or hangs."""

    code = 79
