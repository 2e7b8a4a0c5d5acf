"""The table of figures at the end of a test run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_what_a_test_measured_is_told_at_the_end_of_the_run(tmp_path):
    """A figure that nobody sees is none; it is told also when the test fails, for then it matters."""
    test = tmp_path / "test_measured.py"
    test.write_text(
        "from tests.figures import figure\n"
        "def test_a():\n    figure('addresses reached / tried', '0 / 15')\n"
        "def test_b():\n    figure('a ratio', 1.23456)\n    assert False\n"
    )
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_terminal_summary\n")

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", test],
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = run.stdout.splitlines()
    first = next(index for index, line in enumerate(lines) if line.strip("= ") == "figures")

    assert run.returncode == 1
    assert lines[first + 1 : first + 3] == [
        "a ratio                    1.23",
        "addresses reached / tried  0 / 15",
    ]
