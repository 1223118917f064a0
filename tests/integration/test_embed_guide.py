"""The programs of docs/embed-the-router.md do what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import epmesh
from epmesh.view import RankMode
from tests.integration.commands import open_shell

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "embed-the-router.md").read_text()
PROGRAMS = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def run(program: Path, address: str) -> str:
    done = subprocess.run([sys.executable, program, address], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_programs_find_the_experts_and_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(PROGRAMS) == ["ask.py", "ask_async.py", "my_experts.py"]
    for name, code in PROGRAMS.items():
        (tmp_path / name).write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    (command,) = re.findall(r"^epmesh (serve --ranks .*my_experts:make_experts)$", PAGE, re.MULTILINE)[:1]
    with open_shell() as shell:
        shell.start(*command.split())
        with epmesh.connect(shell.address, timeout_s=30) as mesh:
            mesh.wait_view(lambda view: [info.mode for info in view.ranks.values()] == [RankMode.SERVE] * 2, 30)
            mesh.wait_view(lambda view: all(info.front_endpoint for info in view.ranks.values()), 30)
        assert "right: True" in run(tmp_path / "ask.py", shell.address)
        expected = "".join(f"{expert} {expert + 1}.0\n" for expert in range(8))
        assert run(tmp_path / "ask_async.py", shell.address) == expected
