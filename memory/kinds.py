"""What a file is, by its first bytes: a file that was given in the place of another is named in the message."""

HEADER_KEY = "context_forcing_memory"
"""The metadata key of a memory's file."""
VIDEO, MEMORY, PICTURE = "a video", "a memory file", "a picture"
NUM_BYTES = 64
"""First bytes that `kind_of` needs."""


def kind_of(first: bytes) -> str:
    """VIDEO, MEMORY or PICTURE; empty for all other files."""
    if (first[:1] == b"\0" and first[4:8] == b"ftyp") or first.startswith(b"\x1aE\xdf\xa3"):
        return VIDEO
    if first[8:NUM_BYTES].startswith(f'{{"__metadata__":{{"{HEADER_KEY}"'.encode()):
        return MEMORY
    return PICTURE if first.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff")) else ""
