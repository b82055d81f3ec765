"""NOTICE.md: where the set's pictures and words come from, and what their licences ask for."""
# ruff: noqa: E501  (a paragraph of Markdown is one line)

from asynception.data.pictograms.packages import Package

_HEAD = """\
# Pictograms: sources and licences

Pictures of the packages below, rendered small on white, and the words that their authors gave them, split, lower-cased, and kept where enough pictures carry them. `KEY.json` names each picture's `source` and `licence`.

| npm package | content | licence | copyright |
|---|---|---|---|
"""

_OBLIGATIONS = """
What the licences ask of those who pass the set on:

- Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0): give a copy of the licence, keep the notices, and say that files were changed. These were: rendered or scaled, and laid on white.
- MIT and ISC: keep the copyright lines above and the permission notices below.
- Unicode-3.0 (https://www.unicode.org/license.txt), of the CLDR names in emojibase-data: keep its copyright and permission notice.

Logos among the icons are trademarks of their owners; these licences give no right to them.
"""

_MIT = """
## MIT

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

_ISC = """
## ISC

Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted, provided that the above copyright notice and this permission notice appear in all copies.

THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF THIS SOFTWARE.
"""


def notice(packages: tuple[Package, ...]) -> str:
    """The text of NOTICE.md for a set built from `packages`."""
    rows = (
        f"| {p.name} {p.version} | {p.content} | {p.licence} | {p.copyright} |" for p in packages
    )
    return _HEAD + "\n".join(rows) + "\n" + _OBLIGATIONS + _MIT + _ISC
