"""The command, run in this process."""

import sys

import pytest

from context_forcing import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """(arguments) -> exit code, stderr; the command in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["context-forcing", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        run.out = out
        return code, err

    return run
