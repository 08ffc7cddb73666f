"""Numbers as people read them."""

import math
from typing import Any

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_NAMES = {
    "seconds": "Training time",
    "train_seconds": "Training time",
    "flops_per_sample": "FLOPs per sample",
    "weight_bytes": "Weights",
    "gradient_bytes": "Gradients",
    "optimizer_bytes": "Optimizer state",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def short(value: float, *, unit: str = "") -> str:
    """Return a number in three digits or so, with a letter for its size.

    Example:
        >>> short(430_500), short(1_500_000_000, unit="B"), short(0.25), short(12)
        ('430.5 k', '1.5 GB', '0.25', '12')
    """
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e15:
        return f"{value:.3g} {unit}".strip()
    for size, letter in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{_trimmed(value / size)} {letter}{unit}"
    return f"{value:.4g} {unit}".strip()


def count(value: float) -> str:
    """Return a whole number in full.

    Example:
        >>> count(430500)
        '430,500'
    """
    return f"{value:,.0f}" if math.isfinite(value) else "not finite"


def percent(fraction: float, *, digits: int = 1) -> str:
    """Return a fraction as a percentage.

    Example:
        >>> percent(0.9921, digits=2)
        '99.21 %'
    """
    return f"{100 * fraction:.{digits}f} %" if math.isfinite(fraction) else "not finite"


def duration(seconds: float) -> str:
    """Return a time in its two largest units.

    Example:
        >>> duration(7.25), duration(252), duration(7384)
        ('7.2 s', '4 min 12 s', '2 h 3 min')
    """
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def power(value: float) -> str:
    """Return the label of a tick on a logarithmic axis.

    Example:
        >>> power(0.001), power(20.0), power(2e-7)
        ('0.001', '20', '2·10⁻⁷')
    """
    if value <= 0 or 1e-3 <= value < 1e4:
        return f"{value:.6g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = f"{value / 10.0**exponent:.3g}"
    return ("" if factor == "1" else f"{factor}·") + "10" + str(exponent).translate(_SUPERSCRIPTS)


def title(key: str) -> str:
    """Return the name of a recorded number in words.

    Example:
        >>> title("test_accuracy")
        'Test accuracy'
    """
    words = _NAMES.get(key) or key.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def by_name(key: str, value: Any) -> str:
    """Return a recorded value in the unit that its name tells.

    Example:
        >>> by_name("test_accuracy", 0.9921), by_name("seconds", 90.0), by_name("ranks", [3, 5])
        ('99.21 %', '1 min 30 s', '3, 5')
    """
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {by_name('', item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(by_name("", item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return _number(key, value)


def _number(key: str, value: float) -> str:
    if "accuracy" in key:
        return percent(value if abs(value) <= 1 else value / 100, digits=2)
    if key.endswith("seconds"):
        return duration(value)
    if key.endswith("bytes"):
        return short(value, unit="B")
    if isinstance(value, int) or (value.is_integer() and 1e3 <= abs(value) < 1e15):
        return count(value)
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _trimmed(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 10 else f"{value:.2f}".rstrip("0").rstrip(".")
