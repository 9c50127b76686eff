"""One side of a workload, in a process of its own, which the harness starts: does what its environment says."""

import importlib
import sys

from fedkd.garbage import paused

with paused():  # every side imports without looking for garbage, as the command line does
    from common import Clock, answer, this_side, told

SIDES = {
    "flower": "flower:run",
    "pfl": "pfl_research:run",
    "bare": "bare:run",
    "replies": "ours:replies",
    "sums": "ours:sums",
    "apps": "ours:apps",
    "scenario": "runs:scenario",
    "reevaluated": "distillation:reevaluated",
    "distilled": "distillation:distilled",
    "limits": "gpu:limits",
}
"""Where each side's function is: ``function(side, clock)`` returns what `Clock.result` does."""


def main() -> int:
    module, _, function = SIDES[told()["side"]].partition(":")
    clock = Clock(told()["rounds"], told()["warmup"], memory=told().get("memory", False))
    with paused():
        side = getattr(importlib.import_module(module), function)
    answer(side(this_side(), clock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
