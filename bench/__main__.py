"""``python -m bench``: says at once that it begins, as importing torch takes seconds, and ends in a line where others leave a traceback."""

from __future__ import annotations

import os
import sys


def main() -> None:
    print("python -m bench: loading torch …", file=sys.stderr, flush=True)
    try:
        import tyro

        from . import suite
    except ModuleNotFoundError as missing:
        raise SystemExit(f"python -m bench needs {missing.name}, which is not installed: pip install . -r bench/requirements.txt") from None
    tyro.cli(suite.main, prog="python -m bench", config=(tyro.conf.FlagCreatePairsOff,))  # no --no-quick, which --share would overrule


if __name__ == "__main__":  # not in the processes that it starts, which import this module by another name
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read what it says has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        sys.exit(141)
