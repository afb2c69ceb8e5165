"""Which parts of a detector the graph is written for."""

from fpn_d2.errors import UserError


def kind_of(part: object) -> type:
    """The class whose results ``part`` gives: of a fast one of this package, the plain one that it stands for."""
    return getattr(type(part), "plain", type(part))


def expect(what: str, part: object, *names: str, why: str = "") -> None:
    """Let only classes of these names pass: a subclass of another name may compute something else.

    Raises:
        UserError: ``part`` is of another class, or of another project's.
    """
    kind = kind_of(part)
    if kind.__name__ not in names or kind.__module__.split(".")[0] not in ("detectron2", "fpn_d2"):
        raise UserError(
            f"{what} {kind.__name__} cannot be exported: the graph is written for {' and '.join(names)} alone"
            + (f"; {why}" if why else "")
        )
