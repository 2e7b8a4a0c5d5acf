"""What tests measured, told in one table at the end of the run, whatever came of the tests.

A test calls `figure("addresses reached / tried", f"{reached} / {tried}")`. A figure of the same name takes
the place of the earlier one. Nothing here judges: what must hold is asserted where it is measured.
"""

_figures: dict[str, str] = {}


def figure(name: str, value: object) -> None:
    """Have this told at the end of the run; floats with three digits that count."""
    _figures[name] = f"{value:.3g}" if isinstance(value, float) else str(value)


def all() -> dict[str, str]:  # noqa: A001 - read as figures.all()
    """Return what was told so far, by name."""
    return dict(_figures)


def table() -> list[str]:
    """Return a line for each figure, in the order of their names."""
    width = max(map(len, _figures), default=0)
    return [f"{name:{width}}  {value}" for name, value in sorted(_figures.items())]
