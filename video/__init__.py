"""A film from a story: reading stories, the pipeline, the journal, mp4, reports as pictures."""
