"""Published files to state dicts and student cards."""
