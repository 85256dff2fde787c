"""The account of a run's wall time: whatever interrupts it, what is reported adds up to the clock."""

import json
import time

import pytest

from tmljax.train import ledger
from tmljax.train.ledger import Ledger, account


def line(began, at, first, step, **spent):
    return {"began": began, "at": at, "first": first, "step": step, "spent": spent}


def test_training_past_the_step_gone_on_from_was_for_nothing():
    lines = [
        line(100, 110, 0, 4, start=6, training=4),
        line(100, 113, 0, 6, training=2, checkpoint=1),  # lost: the next start goes on from 4
    ]
    assert account(lines, 120, 4) == {"start": 6, "training": 4, "redone": 2, "checkpoint": 1, "down": 7}
    assert account(lines, 120, 6) == {"start": 6, "training": 6, "checkpoint": 1, "down": 7}


def test_a_later_start_that_goes_on_from_before_an_earlier_one_did_loses_the_work_of_both():
    lines = [
        line(0, 10, 0, 4, training=10),
        line(0, 20, 0, 8, training=10),
        line(30, 40, 8, 12, training=10),
    ]
    assert account(lines, 50, 4) == {"training": 10, "redone": 20, "down": 20}  # checkpoint 8 was damaged
    assert account(lines, 50, 0) == {"redone": 30, "down": 20}


def test_the_account_of_any_history_adds_up_to_the_clock(tmp_path):
    now, first = 1000.0, 0
    for start in range(6):
        began = now
        book = Ledger(tmp_path, began)
        book.go_on_from(first)
        book._offset = began - time.perf_counter()
        for step in range(first + 1, first + 4):
            book._offset += 3.0  # three seconds pass
            book.claim("data", 0.5)
            if step == first + 1:
                book.trains()
            row = book.write(step)
        now = book._since + 11.0
        first += 3 if start % 2 else 1
        lost = {name: value for name, value in row.items() if name.startswith("time/lost/")}
        assert row["time/useful"] + sum(lost.values()) == pytest.approx(row["time/wall"])
        assert row["time/wall"] == pytest.approx(book._since - 1000.0)
        assert row["time/goodput"] == pytest.approx(row["time/useful"] / row["time/wall"])
    assert row["time/lost/down"] == pytest.approx(55.0)
    assert row["time/lost/data"] == pytest.approx(9.0)
    assert row["time/lost/redone"] == pytest.approx(3 * 2 * 2.5, abs=0.1)


def test_a_line_cut_short_by_a_crash_spoils_no_later_one(tmp_path):
    book = Ledger(tmp_path)
    book.go_on_from(0)
    book.write(1)
    with open(tmp_path / ledger.FILE, "a") as file:
        file.write('{"began": 1')
    again = Ledger(tmp_path)
    again.go_on_from(1)
    again.write(2)
    assert [json.loads(text)["step"] for text in (tmp_path / ledger.FILE).read_text().splitlines()] == [1, 2]


def test_a_step_that_writes_no_row_is_kept_when_the_last_line_is_old(tmp_path):
    book = Ledger(tmp_path)
    book.go_on_from(0)
    book.write(1)
    for step in range(2, 6):
        book._offset += 0.4 * ledger.SECONDS
        book.keep_up(step)
    assert [json.loads(text)["step"] for text in (tmp_path / ledger.FILE).read_text().splitlines()] == [1, 4]


def test_what_is_said_at_the_end_names_every_cause():
    text = ledger.as_text(account([line(0, 90, 0, 4, training=60, start=30)], 100, 4))
    assert text.startswith("goodput 60.0% of 1:40: 60.0 s of training; lost seconds: start 30.0")
    assert all(cause in text for cause in ledger.CAUSES)
    assert "\n" not in text
