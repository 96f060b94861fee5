"""How the learning rate moves: a factor of its peak for every step.

cosine   /‾‾\\___        wsd   /‾‾‾‾‾‾\\      (warmup, stable, decay: Hu et al., MiniCPM, 2024)
"""

from __future__ import annotations

import math

from glassllama.train.settings import ScheduleSettings


def rate_factor(step: int, schedule: ScheduleSettings) -> float:
    """The share of the peak learning rate that step 0 … steps - 1 is made with, in (0, 1]."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "cosine":
        falling = (step - schedule.warmup) / (schedule.steps - schedule.warmup)
        share = (1 + math.cos(math.pi * falling)) / 2
    else:
        share = min(1.0, (schedule.steps - step) / (schedule.decay * schedule.steps))
    return schedule.floor + (1 - schedule.floor) * share
