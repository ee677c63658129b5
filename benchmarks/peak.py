"""Run a command and print its peak resident memory as JSON: python benchmarks/peak.py LINE COMMAND...

Where LINE is not empty, the command gets SIGTERM once it prints a line that begins so. A program of its own
that imports little: on exec the kernel carries the peak of the forking process over to the new one, so that a
parent with torch in it would put a floor of a gigabyte under every figure.
"""

import json
import os
import signal
import subprocess
import sys
import threading

TIME_LIMIT = 1800.0  # seconds after which the command is killed


def main(stop_at: str, command: list[str]) -> int:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    watch = threading.Timer(TIME_LIMIT, process.kill)
    watch.start()
    lines, stopped = [], False
    for line in process.stdout:
        lines.append(line.decode(errors="replace"))
        if stop_at and not stopped and lines[-1].startswith(stop_at):
            process.send_signal(signal.SIGTERM)
            stopped = True
    _, status, usage = os.wait4(process.pid, 0)
    watch.cancel()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    if code != (128 + signal.SIGTERM if stopped else 0) or bool(stop_at) != stopped:
        print(f"{' '.join(command)} ended with {code}{' after SIGTERM' if stopped else ''}", file=sys.stderr)
        return 1
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    print(json.dumps({"peak_megabytes": usage.ru_maxrss * unit / 1e6, "output": "".join(lines)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
