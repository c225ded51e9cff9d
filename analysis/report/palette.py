"""Colours of the arms, the same in the report's figures and in MLflow's UI."""

INK = "#1b1b1c"  # of the baseline; the report draws it in the page's text colour
# Six after Okabe and Ito, two chosen against them: any two are 17 or more apart in CIELAB, also as seen with protanopia
# and deuteranopia; visible on white and on near-black
COLOURS = ("#2a86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6f4be0", "#8c6239")
DARKER = 0.7  # of each channel, for the arms beyond


def colour_of(place: int) -> str:
    """Colour (#rrggbb) of the arm at a place from 0 among those that are not the baseline; 16 differ.

    Raises ValueError for a negative place.
    """
    if place < 0:
        raise ValueError(f"place {place} is negative: the baseline has INK")
    plain = COLOURS[place % len(COLOURS)]
    if place // len(COLOURS) % 2 == 0:
        return plain
    return "#" + "".join(f"{round(DARKER * int(plain[i : i + 2], 16)):02x}" for i in (1, 3, 5))
