"""Choose the colours of the arms, the same in the report's figures and in MLflow's UI."""

INK = "#1b1b1c"  # the baseline; the report draws it in the text colour of the page
# Six colours follow Okabe and Ito; two were chosen to differ from them. Any two are at least 17 apart in CIELAB, also
# as seen with protanopia and deuteranopia. All are visible on white and on near-black.
COLOURS = ("#2a86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6f4be0", "#8c6239")
DARKER = 0.7  # factor on each channel, for the arms after the eighth


def colour_of(place: int) -> str:
    """Return the colour (#rrggbb) of the arm at `place`, counted from 0 without the baseline; 16 places differ.

    Raises ValueError if `place` is negative.
    """
    if place < 0:
        raise ValueError(f"place {place} is negative: the baseline has INK")
    plain = COLOURS[place % len(COLOURS)]
    if place // len(COLOURS) % 2 == 0:
        return plain
    return "#" + "".join(f"{round(DARKER * int(plain[i : i + 2], 16)):02x}" for i in (1, 3, 5))
