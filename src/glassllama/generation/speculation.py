"""Several ids in one step: guessed from what the text already holds, then checked by the model.

Answers quote: names, code to be changed, a passage to be summed up. Where the last two or three ids
stood before, what followed then is a guess at what follows now (prompt lookup decoding: Saxena,
2023). The model reads the last id and the guess in one step, which costs little more than one id,
for the weights are read once. Each position then chooses its id as ever; the first that differs
from the guess ends the step, and what was read after it is forgotten. So the ids are those of a
loop without guesses, whatever the sampler, and only time can be lost. When a guess is worth its
time is `Speculation.length`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

GRAMS = (3, 2)  # ids that must have stood before, in this order

# Ids read in one step, and its time, in steps of one id: on two cores with the default model; then
# measured as it goes. More than four are worth it by fours: a kernel's tile is of twelve.
TIMES = {2: 1.15, 4: 1.4, 8: 1.9, 12: 2.15}
RISE = 1.1  # the most that one slow step may raise an estimate: the machine has other work, too
GAIN = 1.05  # a guess must promise so many times the ids per second of no guess

# How often the guess is right after so many ids that stood before (the last: or more), at first.
SHARES = (0.0, 0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
MOST = len(SHARES) - 1
MEMORY = 1 / 16  # the weight of the latest guess in such a share


class Lookup:
    """An earlier place in the text like its end, kept up as ids are added: constant time for each.

    `matched` ids before the end are those before `place`; 0 where there is no such place.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self.position = self.matched = 0
        self._after: dict[tuple[int, ...], int] = {}  # ids -> where the latest such gram ends
        for id in ids:
            self.add(id)

    def add(self, id: int) -> None:
        went_on = self.matched > 0 and self.ids[self.position] == id
        self.ids.append(id)
        self.position, self.matched = (self.position + 1, self.matched + 1) if went_on else (0, 0)
        end = len(self.ids)
        for size in GRAMS:
            if size > end:
                continue
            gram = tuple(self.ids[-size:])
            if self.matched < size and gram in self._after:
                self.position, self.matched = self._after[gram], size
            self._after[gram] = end

    def following(self, count: int) -> list[int]:
        """The ids after `place`; where they reach the end of the text, they go round."""
        round_trip = len(self.ids) - self.position
        return [self.ids[self.position + n % round_trip] for n in range(count)]


@dataclass
class Speculation:
    """The guesses at one row: what they are, how long, and how well they did."""

    lookup: Lookup
    shares: list[float] = field(default_factory=lambda: list(SHARES))
    times: dict[int, float] = field(default_factory=lambda: dict(TIMES))
    single: float = 0.0  # seconds of a step of one id

    def guess(self, limit: int) -> list[int]:
        """The ids that may follow, at most `limit`; none where none promise a gain.

        None either before the first step of one id, which all others are compared with.
        """
        if not self.single or not self.lookup.matched:
            return []
        return self.lookup.following(self.length(limit))

    def length(self, limit: int) -> int:
        """How many ids to guess: as many as give most ids per second, by what was seen so far."""
        best, most = 0, GAIN
        share, expected, read = 1.0, 1.0, 1
        for ids, time in self.times.items():
            while read < ids:
                share *= self.shares[min(self.lookup.matched + read - 1, MOST)]
                expected += share
                read += 1
            if ids - 1 <= limit and expected / time > most:
                best, most = ids - 1, expected / time
        return best

    def learn(self, chosen: Sequence[int], read: int, seconds: float) -> None:
        """What came of a step: the ids chosen, how many were read for it, and its time.

        An id shows whether a guess at it was right, or would have been, had there been one.
        """
        for id in chosen:
            self._compare(id)
            self.lookup.add(id)
        if read == 1:
            self.single = min(seconds, RISE * self.single) if self.single else seconds
        elif self.single and read in self.times:  # not so after a shift, which reads half a context
            self.times[read] = min(seconds / self.single, RISE * self.times[read])

    def _compare(self, id: int) -> None:
        if self.lookup.matched:
            right = self.lookup.ids[self.lookup.position] == id
            matched = min(self.lookup.matched, MOST)
            self.shares[matched] += MEMORY * (right - self.shares[matched])
