"""Child processes of the command line and the benches: what a parent learns of one, whatever becomes of it."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from fused_inr.cli import children
from fused_inr.cli.children import Child, ask_once

#: A child that does what its requests say.
SERVES = """
import os, subprocess, sys, time
from fused_inr.cli import children

def answer(request, tell):
    match request["do"]:
        case "double":
            tell("doubling")
            return {"twice": 2 * request["number"]}
        case "die":
            print("so long")
            sys.stdout.flush()
            os._exit(request["code"])
        case "sleep":
            tell("sleeping")
            print("good night", flush=True)
            time.sleep(1000)
        case "raise":
            raise ValueError("no good\\nin two lines")
        case "lose":
            raise children.Lost("the device's context is gone")
        case "an answer that is none":
            return {"set": {1, 2}}
        case "print":
            print("garbage")
            print('{"now": "nonsense"}', flush=True)
            os.write(1, b'{"twice": 1}\\n')
            subprocess.run(["echo", "of another process"], check=True)
            return {"read": sys.stdin.read()}
        case "start":
            return {"pid": subprocess.Popen(["sleep", "1000"]).pid}
"""
SERVE = "\nsys.exit(children.serve(answer))"


@pytest.fixture
def started(tmp_path):
    child = Child("-c", SERVES + SERVE, log=tmp_path / "log.txt")
    yield child
    child.close()


def test_one_answer_for_each_request(started):
    for number in (2, 3):
        assert started.now is None or number == 3
        assert started.ask({"do": "double", "number": number}, 60) == {"twice": 2 * number}
        assert started.now == "doubling"
    assert started.finish(60) == {}


def test_an_exception_is_an_answer_and_the_next_request_is_served(started, tmp_path):
    assert started.ask({"do": "raise"}, 60) == {"error": "ValueError: no good"}
    assert "TypeError" in started.ask({"do": "an answer that is none"}, 60)["error"]
    assert started.ask({"do": "double", "number": 2}, 60) == {"twice": 4}
    assert started.ask({"do": "lose"}, 60) == {"error": "the device's context is gone", "lost": True}
    started.close()
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_a_dead_child_is_told_with_its_last_words(started):
    answer = started.ask({"do": "die", "code": 3}, 60)
    assert answer == {"error": "its process ended with exit code 3; it last said: so long", "lost": True}
    assert started.ask({"do": "double", "number": 2}, 60) == answer  # and whoever asks again is told again


def test_a_child_that_cannot_start_is_told_with_its_last_words():
    answer = ask_once(("-c", "raise SystemExit('no device')"), {"do": "double"}, 60)
    assert answer == {"error": "its process ended with exit code 1; it last said: no device"}


def test_a_time_limit(started):
    assert started.ask({"do": "double", "number": 2}, 60)
    answer = started.ask({"do": "sleep"}, 2.0)
    assert answer == {"error": "not done within 2 s; it last said: good night", "lost": True}
    assert started.now == "sleeping"
    assert started.ask({"do": "double", "number": 2}, 60)["lost"]  # and not the answer of the one before


def test_a_time_limit_for_a_request_that_nobody_reads():
    answer = ask_once(("-c", "import time; time.sleep(1000)"), {"long": "x" * (1 << 24)}, 0.5)
    assert answer == {"error": "not done within 0 s"}


def test_what_is_printed_is_no_answer(tmp_path):
    """Before the child serves, while it answers, by the processes that it starts; and nothing reads the requests."""
    child = Child("-c", f"print('{{}}', flush=True)\n{SERVES}{SERVE}", log=tmp_path / "log.txt")
    try:
        assert child.ask({"do": "print"}, 60) == {"read": ""}
        assert child.now is None
    finally:
        child.close()
    log = (tmp_path / "log.txt").read_text()
    assert all(words in log for words in ("{}", "garbage", '{"twice": 1}', "of another process"))


def test_a_child_that_fails_at_its_end_has_failed():
    request = {"do": "double", "number": 2}
    assert ask_once(("-c", SERVES + SERVE), request, 60) == {"twice": 4}
    answer = ask_once(("-c", f"{SERVES}\nchildren.serve(answer)\nos._exit(7)"), request, 60)
    assert answer == {"error": "its process ended with exit code 7"}
    child = Child("-c", f"{SERVES}\nchildren.serve(answer)\ntime.sleep(1000)")
    try:
        assert child.ask(request, 60) == {"twice": 4}
        assert child.finish(0.2) == {"error": "its process did not end within 0 s", "lost": True}
    finally:
        child.close()


def test_closing_ends_what_the_child_started(started):
    pid = started.ask({"do": "start"}, 60)["pid"]
    os.kill(pid, 0)
    started.close()
    for _ in range(100):  # whoever adopted it reaps it
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


def test_a_child_ends_when_its_parent_is_gone(tmp_path):
    code = f"""
import os
from fused_inr.cli.children import Child
child = Child("-c", {SERVES + SERVE!r})
child.ask({{"do": "double", "number": 1}}, 60)
print(child._process.pid, flush=True)
os._exit(0)
"""
    command, environment = children.python("-c", code), children.environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}") or "\nState:\tZ" in open(f"/proc/{pid}/status").read():
            return
        time.sleep(0.1)
    pytest.fail("it is still there")
