"""Runs the code of docs/walkthrough.md from top to bottom, and prints what it prints.

    python -m docs.explain            # every number of the page, in its order
    python -m docs.explain --write    # puts them into the page, and writes walkthrough.ipynb

A block of Python in the page is followed by a block of text: what it printed. A test runs the
page and compares; the notebook is the page, cell by cell.
"""

import contextlib
import io
import json
import re
from pathlib import Path

from launch import Parser

PAGE = Path(__file__).with_name("walkthrough.md")
NOTEBOOK = PAGE.with_suffix(".ipynb")
BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
FIRST_CELL = """\
import os

if not os.path.exists("grpo.py"):  # a notebook starts in its own directory
    os.chdir("..")
"""


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--write", action="store_true", help="update the page and the notebook")
    return parser.parse_args(argv)


def run_blocks(page):
    """What each block of Python prints, one after the other in one namespace."""
    names = {}
    for code, _ in BLOCK.findall(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, PAGE.name, "exec"), names)
        yield out.getvalue()


def with_outputs(page, outputs):
    """The page with these in place of what its blocks printed before."""
    outputs = iter(outputs)

    def updated(block):
        return f"```python\n{block[1]}```\n\n```text\n{next(outputs)}```\n"

    return BLOCK.sub(updated, page)


def notebook(page):
    """The page as a Jupyter notebook, without its last parts, which are no code."""
    cells = [("code", FIRST_CELL, "")]
    end = 0
    for block in BLOCK.finditer(page):
        cells += [("markdown", page[end:block.start()], ""), ("code", block[1], block[2])]
        end = block.end()
    cells.append(("markdown", page[end:], ""))
    return {"cells": [cell(i, *each) for i, each in enumerate(cells)], "nbformat": 4,
            "nbformat_minor": 5, "metadata": {"kernelspec": {
                "name": "python3", "display_name": "Python 3", "language": "python"}}}


def cell(number, kind, source, printed):
    made = {"cell_type": kind, "id": f"cell-{number}", "metadata": {},
            "source": source.strip().splitlines(keepends=True)}
    if kind == "code":
        outputs = []
        if printed:
            outputs.append({"output_type": "stream", "name": "stdout",
                            "text": printed.splitlines(keepends=True)})
        made |= {"execution_count": None, "outputs": outputs}
    return made


def main(args):
    page = PAGE.read_text(encoding="utf-8")
    outputs = []
    for printed in run_blocks(page):
        print(printed)
        outputs.append(printed)
    if args.write:
        page = with_outputs(page, outputs)
        PAGE.write_text(page, encoding="utf-8", newline="\n")
        text = json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"
        NOTEBOOK.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(parse_args())
