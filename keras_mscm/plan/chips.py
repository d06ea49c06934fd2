"""What is known of TPU chips, and how they are wired into slices."""

import dataclasses
import math
import re

from keras_mscm import checks


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, in published numbers.

    Args:
        name: What it is called.
        peak_flops: bfloat16 FLOPs per second.
        memory_bytes: High-bandwidth memory.
        memory_bandwidth: Its bytes per second.
        clock: Cycles per second.
        link_bandwidth: Bytes per second, one way, of one link to a neighbour.
        ring_length: Length from which on an axis of a slice is closed to a
            ring.
        max_chips: Chips of the largest slice.

    Reference:
        Google Cloud, *TPU system architecture*; Austin et al., *How to scale
        your model*, 2025, for links and rings. The clock is what the peak and
        the number of 128 x 128 (v6e: 256 x 256) multiply-add units come to.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    clock: float
    link_bandwidth: float
    ring_length: int
    max_chips: int


#: By the name that begins a topology's.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 1.05e9, 45e9, 4, 4096),
    "v5e": Chip("TPU v5e", 197e12, 16 * 2**30, 819e9, 1.5e9, 45e9, 16, 256),
    "v5p": Chip("TPU v5p", 459e12, 95 * 2**30, 2765e9, 1.75e9, 90e9, 4, 8960),
    "v6e": Chip("TPU v6e", 918e12, 32 * 2**30, 1640e9, 1.75e9, 90e9, 16, 256),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips in a grid.

    Args:
        topology: What it is called, such as `"v5e:8x8"`.

    Raises:
        ValueError: If that is not a known chip and its numbers along each
            axis, or more chips than there are in one slice.

    Example:

    >>> Slice("v5e:8x8").num_chips
    64
    """

    topology: str

    def __post_init__(self):
        known = "|".join(CHIPS)
        length = "[1-9][0-9]{0,3}"
        if not isinstance(self.topology, str) or not re.fullmatch(
            rf"({known}):{length}x{length}(x{length})?", self.topology
        ):
            allowed = (
                f"a chip, one of {list(CHIPS)}, and chips along each axis, "
                "such as 'v5e:8x8'"
            )
            raise checks.invalid("topology", allowed, self.topology)
        if self.num_chips > self.chip.max_chips:
            raise ValueError(
                "`topology` must be a slice of at most "
                f"{self.chip.max_chips} chips of {self.chip.name}. Received: "
                f"topology={self.topology!r}, {self.num_chips} chips"
            )

    @property
    def chip(self) -> Chip:
        """What it is made of."""
        return CHIPS[self.topology.split(":")[0]]

    @property
    def axes(self) -> tuple[int, ...]:
        """Chips along each axis."""
        return tuple(map(int, self.topology.split(":")[1].split("x")))

    @property
    def num_chips(self) -> int:
        """Chips in all."""
        return math.prod(self.axes)

    @property
    def collective_bandwidth(self) -> float:
        """Bytes per second that each chip sends when all chips share data.

        An axis that is a ring is used both ways at once; a line one way, as
        what comes to its end has to go back.
        """
        links = sum(
            2 if length >= self.chip.ring_length else 1
            for length in self.axes
            if length > 1
        )
        return links * self.chip.link_bandwidth
