"""HTML from templates, in which every value is escaped that is not HTML already.

row = fill("<td>{value:.2f}</td>", value=1.5)
fill('<tr title="{name}">{row}</tr>', name="<any> name", row=row)
"""

import html
from collections.abc import Iterable
from string import Formatter


class Html(str):
    """Text in which `<` begins a tag. Only `fill` and code that writes tags by hand make it."""


NOTHING = Html()


class _Escaping(Formatter):
    def format_field(self, value: object, spec: str) -> str:
        formatted = format(value, spec)
        return formatted if isinstance(value, Html) else html.escape(formatted)


def fill(template: str, **values: object) -> Html:
    """The template with its fields filled in, as by `str.format`. It must not hold data itself."""
    return Html(_Escaping().vformat(template, (), values))


def join(parts: Iterable[object], between: Html = NOTHING) -> Html:
    """Parts one after the other, escaped where they are not HTML."""
    return Html(between.join(fill("{part}", part=part) for part in parts))
