"The program, run in this process."

import json

from typer.testing import CliRunner

from steer_nb.cli.cli import app


def run(*words):
    "Exit code, stdout and stderr of a command, run in this process."
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception  # the program would show a traceback
    return result.exit_code, result.stdout, result.stderr


def check(*words):
    "The stdout of a command that must succeed."
    code, out, err = run(*words)
    assert code == 0, err
    return out


def json_of(path):
    return json.loads(path.read_text())
