"""A hook of mkdocs: docstrings name functions as Sphinx does, :func:`name`; pages show the name."""

import re


def on_page_content(html, **_):
    return re.sub(r":(?:func|class|meth|mod):(?=<code>)", "", html)
