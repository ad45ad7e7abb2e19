"""Reading files that anyone may have put there: nothing is waited for, and nothing without an end is read.

A pipe in a folder that was copied from somewhere would hold a reader for ever, and a link to a device would fill the
memory. So files are opened here, and an error names them; callers turn its OSError into one of their own kind.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

# The largest tokenizer or manifest that is read whole; a million shards are described in a quarter of it.
LARGEST_TEXT = 1 << 30


def open_plain(path: Path, follow: bool = False) -> BufferedReader:
    """Opens a plain file to read; raises OSError for a folder, a pipe or a device, without waiting for it.

    follow: whether `path` may be a link to one, as people and caches of downloads make them.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, limit: int = LARGEST_TEXT) -> bytes:
    """The whole of a plain file or of what a link leads to; raises OSError where it is neither, or beyond `limit`."""
    with open_plain(path, follow=True) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EINVAL, f"larger than {limit} bytes", str(path))
    return content


def check_plain(path: Path) -> None:
    """Raises OSError unless `path` is a plain file or a link to one, before a library opens it by its name."""
    open_plain(path, follow=True).close()
