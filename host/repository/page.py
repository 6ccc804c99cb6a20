"""The page that shows a person what a repository has: one static file, no scripts."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from html import escape

from apppot.host.common.units import format_size
from apppot.host.repository.model import Index, IndexEntry, Kind

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>AppPot images</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .5rem .75rem .5rem 0;
         border-bottom: 1px solid #d5d5d5; }
code, pre { font: 14px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: #f2f2f2; padding: .75rem; white-space: pre-wrap; }
.size { text-align: right; white-space: nowrap; }
small { color: #555; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #161616; } pre { background: #242424; }
  small { color: #a8a8a8; } th, td { border-color: #3a3a3a; } }
</style>
</head>
<body>
"""


def render(index: Index, public_keys: Iterable[str]) -> str:
    """The page for one index; everything that came from elsewhere is escaped."""
    rows = "".join(_row(entry) for entry in index.entries)
    keys = "\n".join(f"apppot key trust {key} --repository URL" for key in public_keys)
    example = index.entries[0].name if index.entries else "NAME"
    return (
        f"{_HEAD}<h1>AppPot images</h1>\n"
        "<p>To use them, with this page's address as URL (compare the key with what its publisher"
        " told you some other way):</p>\n"
        f"<pre>{escape(keys)}\napppot pull URL/{escape(example)}</pre>\n"
        "<table>\n<thead><tr><th>Name</th><th>Version</th><th>What it is</th>"
        '<th class="size">Size</th><th>Created</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table>\n"
        f"<p><small>Serial {index.serial}, {escape(index.time)}</small></p>\n</body>\n</html>\n"
    )


def _row(entry: IndexEntry) -> str:
    details = [escape(entry.distribution)] if entry.distribution else []
    if entry.kind is Kind.CHANGES:
        base = f" for {entry.parent[:12]}" if entry.parent else ""
        details.append(f"changes{base}")
    if entry.command:
        details.append(f"runs <code>{escape(shlex.join(entry.command))}</code>")
    details.append(f"sha256 <code>{entry.digest}</code>")
    return (
        f"<tr><td>{escape(entry.name)}</td><td>{escape(entry.version)}</td>"
        f"<td>{escape(entry.description)}<br><small>{'<br>'.join(details)}</small></td>"
        f'<td class="size">{format_size(entry.size)}</td>'
        f"<td>{escape(entry.created[:10])}</td></tr>\n"
    )
