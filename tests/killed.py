"""Runs d2o and sends it a signal where a function is called: `killed.py SIGNAL FUNCTION CALL WHEN WHO command …`.

SIGNAL is a name, such as SIGKILL; FUNCTION is `module:name` or `module:Class.name`; CALL counts from 1; WHEN is
`before` or `after` the call; WHO is `all` (the whole process group) or the number of a rank. So a kill does not
depend on timing.
"""

import functools
import importlib
import os
import signal
import sys


def kill_at(signal_name: str, function: str, call: int, when: str, who: str) -> None:
    """Replace a function with one that sends a signal to this process, or its group, at its `call`-th call."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), 0
    sent = signal.Signals[signal_name]

    def die():
        if who == "all":
            os.killpg(0, sent)
        elif who == os.environ.get("RANK"):
            os.kill(os.getpid(), sent)

    @functools.wraps(original)
    def replaced(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            die()
        result = original(*args, **kwargs)
        if calls == call and when == "after":
            die()
        return result

    setattr(owner, name, replaced)


if __name__ == "__main__":
    signal_name, function, call, when, who, *sys.argv[1:] = sys.argv[1:]
    kill_at(signal_name, function, int(call), when, who)
    from d2o import cli

    cli.main()
