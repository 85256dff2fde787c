import io
import json

import numpy as np
from tensorboardX.proto import event_pb2

from tmljax.train.metrics import Journal, Progress, clock, read_rows


def events(workdir) -> list[event_pb2.Event]:
    """Of all event files, oldest first: records are length, crc, bytes, crc."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def write(workdir, start, steps, loss=1.5):
    journal = Journal(workdir, start)
    for step in steps:
        journal.write({"step": step, "loss/total": loss * step})
    journal.close()


def test_values_survive_to_the_last_bit(tmp_path):
    value = float(np.float32(1) / np.float32(3))
    journal = Journal(tmp_path, 0)
    journal.write({"step": 1, "loss/total": value})
    journal.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/total": value}]


def test_rows_after_the_checkpoint_are_dropped_and_written_again_once(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    write(tmp_path, 2, [3, 4, 5])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_row_cut_short_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss/to')
    write(tmp_path, 2, [3])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_every_line_is_strict_json_even_of_a_loss_that_is_not_finite(tmp_path):
    write(tmp_path, 0, [1], loss=float("nan"))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {"step": 1, "loss/total": None}


def test_tensorboard_gets_the_same_values_and_is_told_of_the_restart(tmp_path):
    write(tmp_path, 0, [1, 2])
    write(tmp_path, 1, [2])
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(1, "loss/total", 1.5), (2, "loss/total", 3.0), (2, "loss/total", 3.0)]
    restarts = [e.step for e in events(tmp_path) if e.session_log.status == event_pb2.SessionLog.START]
    assert restarts == [2]


def test_without_a_terminal_progress_is_a_line_a_row():
    out = io.StringIO()
    progress = Progress(4, 8, out)
    for step in (5, 6):
        progress.advance()
        progress.show(
            {
                "step": step,
                "loss/total": 2.0,
                "loss/text": 1.25,
                "val/loss/total": 3.0,
                "time/conversation_seconds_per_second": 120.0,
            }
        )
    progress.close()
    first, second = out.getvalue().splitlines()
    assert first == "step 5/8: loss 2.000 text 1.250 held-out 3.000, 120 s/s, compiled"
    assert second.startswith("step 6/8: loss 2.000")
    assert second.endswith("0:00 left")


def test_on_a_terminal_progress_is_a_bar_with_rate_and_time_left():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    progress = Progress(4, 8, out)
    progress.advance()
    progress.show({"step": 5, "loss/total": 2.0, "time/conversation_seconds_per_second": 120.0})
    progress.close()
    last = out.getvalue().split("\r")[-1]
    assert "5/8" in last
    assert "loss 2.000, 120 s/s" in last
    assert "<" in last, "elapsed<left"


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]
