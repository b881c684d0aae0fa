from ..cli.conftest import run, save_tiny_student, student  # noqa: F401
from . import drill


def pytest_terminal_summary(terminalreporter):
    if drill.tried:
        terminalreporter.section("bad inputs")
        for kind, number in sorted(drill.tried.items()):
            terminalreporter.line(f"{kind}: {number} tried, {drill.refused[kind]} refused")
        terminalreporter.line(f"all: {drill.tried.total()} tried")
