"""Tables as a terminal shows them."""

from __future__ import annotations

import pytest

from dream_pyg.cli.output import print_table


def test_columns_are_aligned_by_what_a_terminal_shows(capsys: pytest.CaptureFixture[str]):
    print_table([{"item": "\u672c\u68da", "rank": 1}, {"item": "cafe\u0301", "rank": 12}, {"item": "plain", "rank": 3}])
    assert capsys.readouterr().out.splitlines() == [
        "item   rank",
        "\u672c\u68da      1",
        "cafe\u0301     12",
        "plain     3",
    ]


def test_wide_names_of_columns_leave_room(capsys: pytest.CaptureFixture[str]):
    print_table([{"\uff35ser": 1234, "x": "a"}])
    assert capsys.readouterr().out.splitlines() == ["\uff35ser  x", "1,234  a"]
