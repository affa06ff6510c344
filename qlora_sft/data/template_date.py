"""Fix today's date in a chat template for a whole run.

Some templates (Llama 3.2's, gpt-oss') write the date of the rendering into every conversation, by the function
``strftime_now`` that transformers gives them. A run that goes on the next day, or its cache, would hold other tokens.
So the template gets a function of that name in its own text, which writes the date on which the run began.
"""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time

# Directives of strftime, the padded ones of glibc among them.
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdDeFHIjklmMnpPrRSsTuUVwWxXyYzZCGgh"]


def today() -> date:
    return date.today()


def writes_date(template: str) -> bool:
    return re.search(r"\bstrftime_now\s*\(", template) is not None


def with_date(template: str, day: date) -> str:
    """Returns the template with ``strftime_now`` writing ``day``, at midnight, instead of the moment of the rendering.

    The function stands in front of the first line, so that lines keep their numbers.
    """
    moment = datetime.combine(day, time())
    # If the template's text has no format, it comes from an argument, and may be any.
    used = [directive for directive in _DIRECTIVES if directive in template] or _DIRECTIVES
    values = {directive: moment.strftime(directive) for directive in used}
    # A doubled sign is out of the way while the others are replaced.
    table = json.dumps({"%%": "\0", **values, "\0": "%"})
    return (
        "{%- macro strftime_now(format) -%}{%- set text = namespace(is=format) -%}"
        f"{{%- for directive, value in {table}.items() -%}}"
        "{%- set text.is = text.is | replace(directive, value) -%}{%- endfor -%}{{- text.is -}}{%- endmacro -%}"
        + template
    )
