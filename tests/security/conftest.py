from ..cli.conftest import refused, run, save_tiny_student, student, succeeded  # noqa: F401
