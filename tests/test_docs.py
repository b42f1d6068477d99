"""Tests of README.md and docs/: links, commands, flags and numbers."""

import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

import attention
import generate
import grpo
from docs import exercises, explain, gpu_check
from tests.common import ROOT, in_process, run, varlen_on_cpu

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "data" / "README.md", ROOT / "data" / "tiny" / "README.md"]
STAND_INS = {"S": "0", "N": "1", "P": "plain", "GPUS:GIB": "1:24"}  # values for placeholders
SUFFIXES = ("py", "html", "png", "jsonl", "safetensors")  # such as model.safetensors
OTHERS = ("venv", "pip", "mine.py")  # not scripts of this repository


def _text(page):
    return page.read_text(encoding="utf-8")


def _slug(heading):
    """GitHub's anchor for a heading."""
    words = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w -]", "", words).replace(" ", "-")


def _commands(text):
    """Yield every command in a page's code blocks and inline code, without comments."""
    text = text.replace("\\\n", " ")
    spans = re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [line.strip() for line in text.splitlines()]
    for line in spans + lines:
        for part in re.split(r" && |; (?=python|torchrun)", re.sub(r"\s#\s.*", "", line)):
            part = re.sub(r"^([A-Z_]+=\S+ )+", "", part.strip())
            if re.match(r"(python|torchrun) ", part):
                yield part


def _parse(command):
    """Parse a command with its script's own parser."""
    words = [STAND_INS.get(word, word) for word in shlex.split(command)]
    if "FLAGS" in words:
        words.remove("FLAGS")
    if words[1] == "-c":
        return compile(words[2], command, "exec")
    if words[0] == "torchrun":
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[first:]]
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    if name in OTHERS:
        return None
    assert words[1] == "-m" or name.endswith(".py"), "expected a script"
    path = name.replace(".", "/") + ".py" if words[1] == "-m" else name
    assert (ROOT / path).is_file(), f"no file {path}"
    assert words[1] == "-m" or "/" not in path, f"not run as a module: {path}"
    if "def parse_args(" in _text(ROOT / path):
        importlib.import_module(path[:-3].replace("/", ".")).parse_args(rest)


def test_docs_links_have_targets():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
            path, _, anchor = target.partition("#")
            if path.startswith("http"):
                continue
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name}: no file {target}"
            if anchor:
                slugs = [_slug(h) for h in re.findall(r"^#+ (.*)", _text(found), re.MULTILINE)]
                assert anchor in slugs, f"{page.name}: no heading {target}"


def test_docs_name_files_and_functions_that_exist():
    """Such as `data/steps.py` and `grpo.policy_loss`."""
    for page in PAGES:
        for path in re.findall(r"`((?:data|docs|tests)/[\w/]+\.\w+)`", _text(page)):
            assert (ROOT / path).exists() or path.startswith("data/cache"), (page.name, path)
        for file, name in re.findall(r"`(\w+)\.(\w+)`", _text(page)):
            if (ROOT / f"{file}.py").is_file() and name not in SUFFIXES:
                assert hasattr(importlib.import_module(file), name), (page.name, file, name)


def test_readme_names_the_functions_of_the_seven_steps():
    [table] = re.findall(r"## GRPO in seven steps(.*?)\n## ", _text(PAGES[0]), re.DOTALL)
    steps = re.findall(r"^\d\. .*?:\s+(`.*?)\.$", table, re.MULTILINE | re.DOTALL)
    assert len(steps) == 7, steps
    for name in re.findall(r"`(\w+)`", " ".join(steps)):
        assert hasattr(grpo, name), f"README: grpo.py has no {name}"


def test_readme_example_of_your_own_runs():
    """Run the README's file and train on its problems. settings.md names only logged metrics."""
    [code] = re.findall(r"```python\n(.*?)```", _text(PAGES[0]), re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder, "mine.py")
        mine.write_text(code, encoding="utf-8")
        mine.with_suffix(".jsonl").write_text(run(mine), encoding="utf-8")
        out = in_process(
            "grpo", "--data", mine.with_suffix(".jsonl"), "--run-dir", Path(folder, "run"),
            "--reward", "accuracy=1", "format=0.1", f"{mine}:short=0.2", "--steps", 1,
            "--prompts", 2, "--group", 2, "--eval-limit", 2, "--test-limit", 0, "--processes", 1)
        metrics = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8")
    assert "step 1/1" in out, out
    symptoms = _text(ROOT / "docs" / "settings.md").partition("## Symptom by symptom")[2]
    columns = [line.split("|")[2] for line in symptoms.splitlines() if line.startswith("| ")]
    names = re.findall(r"`([a-z_]+)`", " ".join(columns))
    assert len(names) > 20, names
    for name in names:
        assert f'"{name}' in metrics, f"settings.md: metrics.jsonl has no {name}"


def test_readme_lists_the_files_from_the_ground_up():
    """The table lists every file, and each imports only files above it."""
    [table] = re.findall(r"## The files(.*?)\n## ", _text(PAGES[0]), re.DOTALL)
    order = [name.removesuffix(".py").rstrip("/") for name in
             re.findall(r"^\| `([\w/]+(?:\.py|/))`", table, re.MULTILINE)]
    assert sorted(set(order) - {"data"}) == sorted(p.stem for p in ROOT.glob("*.py")), order
    for place, name in enumerate(order):
        files = [ROOT / f"{name}.py"] if name != "data" else (ROOT / "data").glob("*.py")
        for file in files:
            if name == "data" and "__main__" in _text(file):  # a script, never imported
                continue
            for found in re.findall(r"^(?:from|import) (\w+)", _text(file), re.MULTILINE):
                assert found not in order or found in order[:place + 1], (file.name, found)


def test_docs_commands_parse():
    """Pages once showed commands with files that had moved and flags that were gone."""
    count = 0
    for page in PAGES:
        for command in _commands(_text(page)):
            output = io.StringIO()
            try:
                with contextlib.redirect_stderr(output):
                    _parse(command)
            except (SystemExit, AssertionError, SyntaxError, ValueError) as error:
                reason = f"{output.getvalue()}{error}"
                raise AssertionError(f"{page.name}: {command}: {reason}") from error
            count += 1
    assert count > 60, count


def test_settings_flags_parse():
    """Inline code in docs/settings.md that starts with a flag is valid for grpo.py."""
    spans = re.findall(r"`(--[^`]+)`", _text(ROOT / "docs" / "settings.md"))
    assert len(spans) > 30, spans
    for span in spans:
        words = [STAND_INS.get(word, word) for word in span.split()]
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output):
                grpo.parse_args(words)
        except SystemExit as error:
            if len(words) > 1 or "expected" not in output.getvalue():  # a flag without its value
                raise AssertionError(f"settings.md: {span}: {output.getvalue()}") from error


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def test_walkthrough_prints_its_numbers():
    """Text must match exactly, and numbers to within 1.5 units in the last place."""
    page = _text(explain.PAGE)
    shown = [text for _, text in explain.BLOCK.findall(page)]
    for want, got in zip(shown, explain.run_blocks(page)):
        assert NUMBER.sub("0", want) == NUMBER.sub("0", got), (want, got)
        for a, b in zip(NUMBER.findall(want), NUMBER.findall(got)):
            decimals = len(a.partition(".")[2])
            assert abs(float(a) - float(b)) < 1.5 * 10**-decimals * (decimals > 0) + 1e-9, (a, b)
    assert len(shown) == page.count("```python"), "a block has no output"


def test_walkthrough_notebook_is_the_page():
    stored = json.loads(_text(explain.NOTEBOOK))
    assert stored == explain.notebook(_text(explain.PAGE)), "run: python -m docs.explain --write"
    assert explain.NOTEBOOK.stat().st_size < 50_000


def test_walkthrough_notebook_runs():
    """It runs from top to bottom in a kernel started in docs/, as Jupyter would start it."""
    if not importlib.util.find_spec("nbclient") or not importlib.util.find_spec("ipykernel"):
        raise unittest.SkipTest("not installed: pip install nbclient ipykernel")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(explain.NOTEBOOK, as_version=4)
    wanted = [cell.outputs[0].text for cell in notebook.cells if cell.get("outputs")]
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "docs")}}
                   ).execute()
    printed = ["".join(o.text for o in cell.outputs) for cell in notebook.cells
               if cell.get("outputs")]
    assert [NUMBER.sub("0", text) for text in printed] == [NUMBER.sub("0", t) for t in wanted]


def test_exercises_break_what_they_claim():
    """Each replaces a function that grpo.py still calls, so its metrics change."""
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("none", "baseline", "mask", "temperature"):
            words = [name, "--run-dir", f"{folder}/{name}", "--steps", "1", "--prompts", "3",
                     "--group", "4", "--eval-limit", "1", "--train-limit", "30",
                     "--processes", "1", "--micro-tokens", "99"]
            originals = {part: getattr(grpo, part)
                         for part in ("group_advantages", "policy_loss", "row_logprobs")}
            with mock.patch.multiple(grpo, **originals), contextlib.redirect_stdout(io.StringIO()):
                exercises.main(exercises.parse_args(words))
            lines = Path(folder, name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            metrics[name] = json.loads(lines[-1])
    none = metrics["none"]
    assert metrics["baseline"]["grad_norm"] != none["grad_norm"]
    assert metrics["mask"]["entropy"] < 0.9 * none["entropy"]
    assert none["mismatch"] < 1e-5 and metrics["temperature"]["mismatch"] > 0.01


def test_gpu_check_passes_on_an_emulated_gpu():
    """docs/gpu_check.py runs on the CPU; bfloat16 takes the GPU's path, with emulated kernels."""
    def has_varlen(device, dtype):
        return dtype == torch.bfloat16

    def graph_step(engine, state, settings, step_fn):
        engine.graphs[len(state.tokens), settings] = None
        return state, step_fn

    with (varlen_on_cpu(), mock.patch.object(attention, "has_varlen", has_varlen),
          mock.patch.multiple(generate, has_varlen=has_varlen, graph_step=graph_step,
                              sampling_params=lambda params, config: params),
          contextlib.redirect_stdout(io.StringIO()) as output):
        num_wrong = gpu_check.run_checks(torch.device("cpu"), gpu_check.load_task(4))
    assert num_wrong == 0 and output.getvalue().count(" ok\n") > 25, output.getvalue()
