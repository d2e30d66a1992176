"""Become another program that dies when the process which started it dies.

Called as `python leash.py program argument...`. A pytest that is killed runs no teardown; without this its
workers would live on, and take messages from the tests of the next run. Linux only: elsewhere the program
simply runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.pop("LEASH_HOLDER")):
            sys.exit("the process that wanted this one died before it began")
    os.execv(sys.argv[1], sys.argv[1:])


main()
