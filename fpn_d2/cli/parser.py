"""A parser of command lines whose mistakes are one line: what was wrong, what was meant, where to read on."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fpn_d2.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """As `argparse.ArgumentParser`, with one line in the place of all options after a mistake."""

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._verb_of(parsed).error(f"there is no place for the argument {unknown[0]}")
        return parsed

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = sys.argv[1:] if args is None else args
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for word in args if not self.verbs() else ():
            name = word.partition("=")[0]
            if word == "--":
                break
            # Before argparse complains that something is missing, which is what was mistyped.
            if word.startswith("--") and not any(option.startswith(name) for option in options):
                self.error(f"there is no option {name}{did_you_mean(name, options)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the program with status 2 and one line."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def verbs(self) -> "dict[str, Parser]":
        """Its verbs by name; {} if it has none."""
        actions = (one for one in self._actions if isinstance(one, argparse._SubParsersAction))
        return next((one.choices for one in actions), {})

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            names = ", ".join(action.choices)
            hint = did_you_mean(str(value), action.choices) or f": there are {names}"
            raise argparse.ArgumentError(None, f"there is no {action.metavar.lower()} {value}{hint}")
        super()._check_value(action, value)

    def _verb_of(self, parsed: argparse.Namespace) -> "Parser":
        parser = self
        for name in ("verb", "action"):
            parser = parser.verbs().get(getattr(parsed, name, None), parser)
        return parser
