"""Runs d2o and ends it, as `kill -9` does, where a function is called: `killed.py FUNCTION CALL WHEN WHO command …`.

FUNCTION is `module:name` or `module:Class.name`; CALL counts from 1; WHEN is `before` or `after` the call; WHO is
`all` (the whole process group) or the number of the rank that dies. A kill then needs no luck with the clock.
"""

import functools
import importlib
import os
import signal
import sys


def kill_at(function: str, call: int, when: str, who: str) -> None:
    """Replace a function by one that ends this process, or its group, at its `call`-th call."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), 0

    def die():
        if who == "all":
            os.killpg(0, signal.SIGKILL)
        elif who == os.environ.get("RANK"):
            os.kill(os.getpid(), signal.SIGKILL)

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
    function, call, when, who, *sys.argv[1:] = sys.argv[1:]
    kill_at(function, int(call), when, who)
    from d2o import cli

    cli.main()
