"""Where pages come from: the templates, and how they write a share."""

from __future__ import annotations

import jinja2


def pages() -> jinja2.Environment:
    """Return the templates; a name that a report lacks is an error, never a blank."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("privet.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    return environment
