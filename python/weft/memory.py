"""Memory of large CPU outputs, which weft keeps from one call for the next.

A block of 256 KiB or more that was an output or a gradient of weft waits, when its tensor is gone,
for the next one of about its size, and so does what a kernel used for itself: without that, each
would be fresh memory, which the system fills with zeros first. At most an eighth of the machine's
memory waits (`WEFT_KEPT_OUTPUTS_MB=n` in the environment: n MiB, 0 none), and of blocks that found
no use for ten seconds none.
"""

from weft import _C


def kept_bytes() -> int:
    """Bytes that wait for the next output."""
    return _C.kept_bytes()


def empty_cache() -> None:
    """Gives the memory that waits for the next output back to the system."""
    _C.release_kept()
