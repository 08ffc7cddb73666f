"""What a weight costs: numbers stored, multiplications, and the rank at which factors stop paying."""


def dense_parameters(rows: int, columns: int) -> int:
    """Return the entries of a dense ``(rows, columns)`` weight."""
    return rows * columns


def factor_parameters(rows: int, columns: int, rank: int) -> int:
    """Return the entries of two factors of the given rank.

    Example:
        >>> factor_parameters(500, 800, 7)
        9100
    """
    return rank * (rows + columns)


def break_even_rank(rows: int, columns: int) -> int:
    """Return the largest rank at which two factors hold fewer entries than the dense weight (0 if none does).

    Example:
        >>> break_even_rank(20, 25)
        11
    """
    return (rows * columns - 1) // (rows + columns)


def deployed_parameters(rows: int, columns: int, rank: int) -> int:
    """Return the entries as deployed: two factors, or the dense weight where that is smaller or equal.

    Example:
        >>> deployed_parameters(20, 25, 11), deployed_parameters(20, 25, 12)
        (495, 500)
    """
    return min(factor_parameters(rows, columns, rank), dense_parameters(rows, columns))


def round_up(rank: int, multiple: int) -> int:
    """Return the smallest multiple that holds ``rank``."""
    return -(-rank // multiple) * multiple
