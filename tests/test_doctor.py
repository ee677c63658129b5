"""`ssl-emp doctor`: a check that crashes, hangs or babbles costs itself alone; each finding has a way out."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl_emp.commands import checks, doctor
from ssl_emp.commands.doctor import Finding, examine

FINDING = json.dumps({"text": "fine", "fix": None})


def asked(limits: dict[str, float], program: str) -> dict[str, Finding]:
    return dict(examine(limits, [sys.executable, "-c", program]))


def test_what_a_check_does_to_its_process_costs_the_others_nothing() -> None:
    program = f"""
import os, signal, sys, time
for name in sys.argv[1:]:
    if name == "abort":
        os.kill(os.getpid(), signal.SIGILL)
    if name == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if name == "exit":
        sys.exit("libsomething.so is missing")
    print("Found 3 GPUs!" if name == "babble" else {FINDING!r}, flush=True)
"""
    names = ["first", "abort", "second", "hang", "babble", "exit", "last"]
    found = asked(dict.fromkeys(names, 30.0) | {"hang": 0.3}, program)
    assert list(found) == names
    assert all(found[name] == Finding("fine") for name in ("first", "second", "last"))
    assert found["abort"].text == "the check was ended by SIGILL" and found["abort"].fix
    assert found["hang"].text == "no answer in 0.3 seconds" and found["hang"].fix
    assert found["babble"].text.startswith("cannot be checked") and found["babble"].fix
    assert found["exit"].text == "the check ended with exit code 1 (libsomething.so is missing)"


@pytest.mark.whole
def test_a_stopped_command_ends_a_check_that_hangs(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    hangs = f"import os, time; open({str(place)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"""
import sys
from ssl_emp.commands import doctor
doctor.CHILD = {hangs!r}
sys.exit(doctor.main(["faiss"]))
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while not place.exists() or not place.read_text():
        assert command.poll() is None
        time.sleep(0.05)
    command.terminate()
    assert command.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def test_a_program_that_does_not_start_is_a_finding_for_each(tmp_path: Path) -> None:
    found = asked({"a": 30.0, "b": 30.0}, "raise SystemExit(3)")
    assert [finding.text for finding in found.values()] == ["the check ended with exit code 3"] * 2


def test_the_exit_code_says_whether_there_is_something_to_see_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.report(iter([("a", Finding("fine")), ("b", Finding("\x1b[2J fine"))])) == 0
    said = capsys.readouterr().out
    assert said.startswith("ok    a ") and said.endswith("all is well\n") and "\x1b" not in said
    assert doctor.report(iter([("a", Finding("fine")), ("b", Finding("bad", "mend it"))])) == 2
    assert "\nwarn  b " in (said := capsys.readouterr().out) and "fix: mend it\n1 thing to see to\n" in said


def test_a_check_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["faisss"]) == 2
    assert capsys.readouterr().err == "error: there is no check 'faisss'. fix: did you mean faiss?\n"
    assert list(doctor.LIMITS) == list(checks.CHECKS)
    assert all(re.search(rf"(^|  ){name} ", doctor.WHAT_THEY_ARE, re.M) for name in doctor.LIMITS)


def test_more_threads_than_cores() -> None:
    assert checks.too_many(4, 4, None) is checks.too_many(4, 8, 4) is checks.too_many(1, 1, 1) is None
    for number, cores, quota, fits in ((8, 4, None, 4), (8, 64, 4, 4), (2, 2, 1, 1)):
        found = checks.too_many(number, cores, quota)
        assert found is not None and f"OMP_NUM_THREADS={fits}," in str(found.fix), found


def test_room_on_the_disks(tmp_path: Path) -> None:
    assert checks.judge_space(tmp_path, 1, tmp_path, 1).fix is None
    scarce = checks.judge_space(tmp_path, 1e30, tmp_path, 1)
    assert "GB are soon used" in scarce.text and "out=DIR" in str(scarce.fix)
    gone = checks.judge_space(tmp_path, 1, tmp_path / "none", 1)
    assert "none cannot be written to (No such file" in gone.text and "TMPDIR" in str(gone.fix)


def test_the_checks_say_what_is_here() -> None:
    """In this process, which has all of it loaded; not `compile`, which takes up to a minute."""
    for name in ("python", "packages", "extras", "torch", "device", "bf16", "threads", "images", "faiss"):
        found = checks.CHECKS[name]()
        assert found.text and (found.fix is None or name == "extras"), (name, found)
    assert re.search(r"torch \d.*lightly \d", checks.CHECKS["packages"]().text)


@pytest.mark.whole
def test_the_command_says_it_from_a_folder_with_traps(tmp_path: Path) -> None:
    """Modules of the folder that it is started in are not imported in the place of a library's."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    command = [sys.executable, "-P", "-m", "ssl_emp", "doctor", "python", "space", "images"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, ""), found
    assert re.findall(r"^(\w+) +(\w+)", found.stdout, re.MULTILINE) == [
        ("ok", "python"),
        ("ok", "space"),
        ("ok", "images"),
        ("all", "is"),
    ]
