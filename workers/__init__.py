"""Jobs on many workers."""
