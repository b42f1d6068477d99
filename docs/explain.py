"""Run the code of docs/walkthrough.md from top to bottom and print its output.

    python -m docs.explain            # print the output of every code block
    python -m docs.explain --write    # update the page and walkthrough.ipynb

Each Python block in the page is followed by a text block with its output. A test runs the page and
compares. The notebook has the same content, as cells.
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
    """Yield the output of each Python block; the blocks share one namespace."""
    names = {}
    for code, _ in BLOCK.findall(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, PAGE.name, "exec"), names)
        yield out.getvalue()


def notebook(page):
    """The page as a Jupyter notebook."""
    cells = []

    def add(kind, source, **more):
        cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {},
                      "source": source.strip().splitlines(keepends=True), **more})

    add("code", FIRST_CELL, execution_count=None, outputs=[])
    end = 0
    for block in BLOCK.finditer(page):
        add("markdown", page[end:block.start()])
        printed = {"output_type": "stream", "name": "stdout",
                   "text": block[2].splitlines(keepends=True)}
        add("code", block[1], execution_count=None, outputs=[printed])
        end = block.end()
    add("markdown", page[end:])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}}


def main(args):
    page = PAGE.read_text(encoding="utf-8")
    outputs = list(run_blocks(page))
    print("\n".join(outputs))
    if args.write:
        printed = iter(outputs)
        page = BLOCK.sub(lambda b: f"```python\n{b[1]}```\n\n```text\n{next(printed)}```\n", page)
        PAGE.write_text(page, encoding="utf-8", newline="\n")
        text = json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"
        NOTEBOOK.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(parse_args())
