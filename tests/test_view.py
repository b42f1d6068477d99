"""Tests of view.py and view.html."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import metrics
import view
from tests.common import in_process, raises, skip_unless, temporary_dir, write_lines

# Model output that tries to escape its text node.
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!--<script>", "</style><img src=x onerror='window.hacked = 1'>",
    "<svg onload='window.hacked = 1'>", "DATA_OF_THE_RUNS", "${window.hacked = 1}`\\\"'",
    "&lt;b&gt; \u2028 \u202e backwards \x00 \ud800 \udc00", "wait " * 3000, "{" * 30_000,
    "\\boxed{" * 9, "<think>" * 99 + "</think>" * 99]


def _completion(text):
    words = text.split(" ")
    return {"text": text, "tokens": list(range(len(words))),
            "pieces": re.findall(r"[^ ]* ?", text)[:-1], "logprobs": [-0.5] * len(words),
            "rewards": {"accuracy": 1.0}, "reward": 1.1, "advantage": 0.5, "right": True,
            "finish": "stop"}


def _run(home, name="run", texts=("<think>no, wait: 2</think> so \\boxed{2}",)):
    """A run directory whose groups and held-out answers contain these texts."""
    run_dir = home / name
    run_dir.mkdir()
    (run_dir / "flags.json").write_text(json.dumps({"model": texts[0], "data": ["sums"]}))
    write_lines(run_dir / "starts.jsonl", [{"time": 1e9, "command": f"python grpo.py {texts[-1]}"}])
    (run_dir / "results.md").write_text("|  | problems |\n| --- | --- |\n| before | 500 |\n"
                                        "\n341 of 500 problems gained, 12 lost\n")
    metrics = [{"step": step, "steps": 3, "accuracy": step / 3, "time": 1e9 + 10 * step}
               for step in (1, 2, 3)]
    metrics[-1] |= {"dev_accuracy": 0.5, "dev_accuracy_low": 0.25, "dev_accuracy_high": 0.75}
    write_lines(run_dir / "metrics.jsonl", metrics)
    sample = {"problem": texts[0], "answer": texts[-1], "prompt": texts[0],
              "completions": list(map(_completion, texts))}
    write_lines(run_dir / "samples.jsonl", [
        sample | {"step": step, "kind": kind}
        for step, kind in ((0, "held_out"), (3, "held_out"), (3, "rollout"))])
    return run_dir


def _page(*run_dirs):
    """(the page of these runs, the data in it)"""
    path = run_dirs[0] / "report.html"
    view.write_page(run_dirs, path)
    page = path.read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*)</script>', page)
    return page, json.loads(data)


def test_view_text_is_never_markup():
    """The data are ASCII without "<", and only element() turns strings into nodes."""
    template = view.TEMPLATE.read_text(encoding="utf-8")
    for name in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http:"):
        assert name not in template.replace("http://www.w3.org/2000/svg", ""), name
    assert max(map(len, template.splitlines())) <= 100
    with temporary_dir() as home:
        page, [run] = _page(_run(home, texts=HOSTILE))
    for name in ("<script", "</script", "<style", "<svg", "<!--"):
        assert page.count(name) == template.count(name), name
    assert page.isascii() == template.isascii()
    completions = run["groups"][-1]["completions"]
    assert [c["text"] for c in completions][:8] == HOSTILE[:8]
    assert "".join(completions[0]["pieces"]) == HOSTILE[0]
    long = completions[8]["text"]
    assert "10000 characters omitted" in long and len(long) < 21_000


def test_view_is_bounded_and_accepts_damaged_files():
    """Long runs, megabyte lines, truncated lines, and NaN and infinity, which are not JSON."""
    with temporary_dir() as home:
        run_dir = _run(home)
        rows = [{"step": step, "loss": 1 / step} for step in range(1, 9001)]
        rows[-2]["dev_accuracy"] = rows[1234]["dev_accuracy"] = 0.5
        write_lines(run_dir / "metrics.jsonl", rows)
        sample = view.read_objects(run_dir / "samples.jsonl")[-1]
        sample["completions"] = [_completion("x" * 30_000)] * 2 + [_completion("y " * 5000)]
        samples = [sample | {"step": step} for step in range(20)]
        samples[0]["completions"] = [_completion("z" * 3_000_000), _completion("y " * 5000)]
        write_lines(run_dir / "samples.jsonl", samples)
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write('[1]\n{"step": 9001, "loss": NaN, "lr": 1e999}\n{"step": 9002, "lo')
        with mock.patch.object(view, "MAX_SAMPLES", 500_000):
            page, [run] = _page(run_dir)
    assert len(page) < 1e6
    steps = run["metrics"]["step"]
    assert len(steps) < 2010 and steps[-1] == 9001 and {1235, 8999} <= set(steps)
    assert run["metrics"]["loss"][-1] is None and run["metrics"]["lr"][-1] is None
    kept = {sample["step"] for sample in run["groups"]}
    assert len(kept) + run["left_out"] == 20 and 1 < len(kept) < 19 and {0, 19} <= kept
    first, *_, last = run["groups"][0]["completions"]
    assert not first["pieces"] and not first["logprobs"] and first["num_tokens"] == 1
    assert not last["pieces"] and last["num_tokens"] == 5001


def test_view_command_and_errors():
    with temporary_dir() as home:
        run_dir = _run(home)
        out = in_process("view", run_dir)
        assert f"written to {run_dir / 'report.html'}" in out
        _, [run] = _page(run_dir)
        assert run["seconds"] == 30
        assert run["results"] == {"table": [["", "problems"], ["before", "500"]],
                                  "notes": ["341 of 500 problems gained, 12 lost"]}
        in_process("view", run_dir, _run(home, "other"), "--out", home / "both.html")
        assert "other" in (home / "both.html").read_text()
        with raises(FileNotFoundError, str(home), "flags.json", "grpo.py"):
            in_process("view", home)
        with mock.patch("builtins.print") as printed:
            view.write_report(SimpleNamespace(rank=0, dir=home / "gone"))  # must not raise
        assert "report.html was not written" in printed.call_args[0][0]


def test_view_highlights_the_second_thoughts_that_grpo_counts():
    assert f"/{metrics.SECOND_THOUGHTS.pattern}/gi" in view.TEMPLATE.read_text(encoding="utf-8")


# ---- in a browser

LISTEN = """<script>
window.errors = [];
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, event => errors.push(kind + " " + event.message), true);
</script>"""
CLICK = """<script>
const all = (query, of = document) => [...of.querySelectorAll(query)];
const texts = query => all(query).map(node => node.textContent);
const before = {box: texts(".group .box"), thought: texts(".group .thought"),
                second: texts(".group .second"), cards: all(".card").length};
for (const svg of all("svg")) {
  const {left, width, top} = svg.getBoundingClientRect();
  for (const at of [0, 0.5, 0.99])
    svg.dispatchEvent(new PointerEvent("pointermove", {clientX: left + at * width, clientY: top}));
}
for (const part of all("details")) part.open = true;
for (let i = 0; i < all("button").length; i++) all("button")[i].click();
for (let i = 0; i < all(".overview tr").length; i++) all(".overview tr")[i].click();
for (let i = 0; i < all("select").length; i++)
  for (let j = all("select")[i].options.length; j-- > 0;) {
    all("select")[i].selectedIndex = j;
    all("select")[i].dispatchEvent(new Event("change"));
  }
const outcome = {...before, errors, hacked: window.hacked ?? null, values: texts(".values"),
  unexpected: all("img, iframe, [onload], [onerror], script[src]").length,
  shown: texts(".group .card pre"), tinted: all(".group .tinted span[title]").length,
  page: document.body.innerText, width: innerWidth,
  overflows: Math.max(...all("body > *").map(part => part.scrollWidth)) > innerWidth};
document.body.replaceChildren();  // --dump-dom crashes on half a surrogate
document.title = encodeURIComponent(JSON.stringify(outcome).replace(/\\\\ud[89a-f]../g, "?"));
</script>"""


def _click_through(page, home):
    """The outcome of clicking on everything in the page, in a headless browser."""
    names = [os.environ.get("REASONER_CHROMIUM", ""), "chromium", "chromium-headless-shell",
             "chromium-browser", "google-chrome"]
    browser = next(filter(None, map(shutil.which, names)), None)
    skip_unless(browser, "REASONER_CHROMIUM", "a Chromium")
    path = Path(home, "clicked.html")
    page = page.replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{CLICK}</body>")
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         "--window-size=390,800",  # a phone
         f"--user-data-dir={home}/browser", "--dump-dom", path.as_uri()],
        capture_output=True, timeout=60)
    found = re.search(rb"<title>([^<]*)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    unquoted = re.sub(rb"%(..)", lambda m: bytes([int(m[1], 16)]), found[1])
    return json.loads(unquoted)


def test_view_in_a_browser():
    """No script errors, nothing loaded, and every part of a completion marked correctly."""
    with temporary_dir() as home:
        page, _ = _page(_run(home, "a"), _run(home, "b"))
        seen = _click_through(page, home)
    assert not seen["errors"] and not seen["unexpected"] and not seen["overflows"], seen
    assert seen["width"] == 390 and seen["box"] == ["\\boxed{2}"], seen
    assert seen["second"] == ["wait"], seen
    assert seen["thought"] == ["<think>no, ", "wait", ": 2</think>"], seen
    assert seen["cards"] == 5 and seen["tinted"] == 7, seen  # two runs, before and after; group
    assert "step 3" in seen["values"][0] and "held out 0.5 [0.25, 0.75]" in seen["values"][0]
    for words in ("341 of 500 problems gained, 12 lost", "python grpo.py", "30 s", "--model",
                  "1 of 1 are right", "A +0.50", "5 tokens, finished", "2001-09-09"):
        assert words in seen["page"], (words, seen["page"])


def test_view_in_a_browser_hostile_text_is_harmless():
    with temporary_dir() as home:
        page, _ = _page(_run(home, texts=HOSTILE))
        seen = _click_through(page, home)
    assert seen["hacked"] is None and not seen["unexpected"] and not seen["errors"], seen
    assert not seen["overflows"] and seen["shown"][:6] == HOSTILE[:6], seen["shown"][:6]
    assert len(seen["shown"]) == len(HOSTILE)
