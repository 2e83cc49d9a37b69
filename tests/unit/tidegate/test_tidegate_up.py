"""What `tidegate up` tells besides being ready: trouble that lasts, once, and its end; and the port that it takes."""

import socket
import sys
from pathlib import Path

import pytest

from protocol.deployment import read_deployment
from tidegate.__main__ import main
from tidegate.up_command import with_address
from tidegate.watch import Watch

FAILED = "a/digits_heavy of digits is not ready: no file models/x.onnx"
DIGITS = Path(__file__).parents[3] / "deploy" / "digits.toml"


class Terminal:
    """What was said, and whether it was good news."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bool]] = []
        self.watch = Watch(lambda text, good: self.said.append((text, good)))

    def see(self, *looks: list[str]) -> list[tuple[str, bool]]:
        """What the watch says of these looks."""
        self.said.clear()
        for notices in looks:
            self.watch.look(notices)
        return self.said


def test_trouble_that_lasts_is_told_once_and_its_end_too() -> None:
    terminal = Terminal()
    assert terminal.see([FAILED]) == []
    assert terminal.see([FAILED], [FAILED], [FAILED]) == [(FAILED, False)]
    assert terminal.see([], []) == [(f"over: {FAILED}", True)]
    assert terminal.see([]) == []


def test_a_change_under_way_is_not_told() -> None:
    terminal = Terminal()
    loading = "a/digits_heavy of digits is not ready: loading"
    assert terminal.see([loading], [], [loading], [], [], []) == []
    terminal.see([FAILED], [FAILED])
    assert terminal.see([], [FAILED], [], [FAILED]) == [], "a second try that fails again is no news"


def test_a_count_that_grows_is_no_news() -> None:
    terminal = Terminal()
    texts = [f"x is routed by deadline, not learned-po: table 7 expired {age:.1f} s ago" for age in (1.0, 3.1, 5.2)]
    assert terminal.see(*[[text] for text in texts]) == [(texts[1], False)]


def test_port_0_becomes_a_free_one_and_no_port_means_the_files() -> None:
    file = read_deployment(DIGITS)
    assert with_address(file, None, None).gateway.port == file.gateway.port == 8700
    assert with_address(file, None, 8765).gateway.port == 8765
    port = with_address(file, None, 0).gateway.port
    assert port not in (0, file.gateway.port)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_ctrl_c_during_the_imports_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupting:
        """What finds modules: for the command line, Ctrl-C."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "tidegate.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "tidegate.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "tidegate: interrupted\n"
