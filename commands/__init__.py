"""Commands of `context-forcing` that stand in files of their own, and options that several share."""
