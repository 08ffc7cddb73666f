"""Tables as plain text."""


def aligned(head: tuple[str, ...], rows: list[tuple[str, ...]], *, right: tuple[int, ...]) -> str:
    """Return a plain text table; the columns in ``right`` are aligned to the right.

    Example:
        >>> print(aligned(("a", "b"), [("x", "10"), ("long", "2")], right=(1,)))
        a      b
        x     10
        long   2
    """
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    pads = [str.rjust if column in right else str.ljust for column in range(len(head))]
    lines = ([pad(cell, width) for cell, width, pad in zip(row, widths, pads, strict=True)] for row in (head, *rows))
    return "\n".join("  ".join(line).rstrip() for line in lines)
