"""Keeps what ptxas says of each kernel (registers, spills, shared memory), beside the library, where a test reads it.

    ptxas_log.py compile COMMAND...      runs a compiler; of its output, what ptxas -v reports goes to OBJECT.ptxas instead
    ptxas_log.py join FILE OBJECT...     the reports of all objects of the library, in one file

CMakeLists.txt calls both. A compiler cache goes behind `compile`: it repeats the report of an object it has.
"""

import re
import subprocess
import sys
from pathlib import Path

REPORT = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


def compile_with(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = done.stdout.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if not REPORT.match(line))
    if done.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(line for line in lines if REPORT.match(line)))
    return done.returncode


def join(file, objects):
    Path(file).write_text("".join(Path(name + ".ptxas").read_text() for name in objects))
    return 0


if __name__ == "__main__":
    sys.exit(compile_with(sys.argv[2:]) if sys.argv[1] == "compile" else join(sys.argv[2], sys.argv[3:]))
