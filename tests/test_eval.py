"""Tests of eval.py."""

import contextlib
import io
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import eval as evaluation
from data.families import split_of
from data.prompts import PRESETS, load_shots, prompt_hash, render_prompt
from model import save_model
from tests.common import (
    answering,
    error_of,
    in_process,
    parse_sum,
    raises,
    read_lines,
    run,
    scripted_setup,
    small_model,
    sum_problems,
    temporary_dir,
    write_lines,
)


def _save_small(folder, name, seed=0):
    """Save small_model() as a model directory; return its path."""
    params, config, tokenizer = small_model(seed)
    tokenizer.save(f"{folder}/tokenizer.json")
    save_model(Path(folder) / name, params, config, like=folder)
    return Path(folder) / name


def _evaluate(reply_fn, problems, **options):
    """evaluate() with a model that replies reply_fn(prompt, prompt seed, sample)."""
    with answering(reply_fn):
        return evaluation.evaluate(None, *small_model()[1:], problems, **options)


def _collect(setup, reply_fn):
    """collect_records() with such a model, without timings and settings."""
    with answering(reply_fn):
        records, _ = evaluation.collect_records(setup)
    return [_answer(record) for record in records]


def _answer(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "settings")}


def _rates(row):
    return {name: rate for name, (rate, *_) in row["rates"].items()}


def test_eval_prompts_match_the_published_text():
    """Every space counts: blank lines separate the examples, and no newline ends the prompt."""
    problem = {"problem": r"What is {x} in \boxed{}?"}
    plain = "<|im_start|>user\nWhat is {x} in \\boxed{}?<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt("plain", problem) == plain
    system = "<|im_start|>system\nS<|im_end|>\n"
    assert render_prompt("plain", problem, system="S") == system + plain
    boxed = render_prompt("boxed", problem, system="the model's own")
    assert boxed.startswith("<|im_start|>system\nPlease reason step by step, and put your final "
                            "answer within \\boxed{}.<|im_end|>\n"), boxed
    gsm8k = render_prompt("qwen-base-gsm8k", problem)
    assert gsm8k.count("Question: ") == 5 and gsm8k.count("The answer is ") == 4
    assert gsm8k.endswith("\\boxed{}?\nAnswer:") and "\\\n" not in gsm8k
    assert "The answer is 8.\n\nQuestion: What is {x}" in gsm8k
    minerva = render_prompt("minerva-math", problem)
    assert minerva.count("Problem:\n") == 5 and minerva.endswith("?\n\nSolution:")
    assert minerva.count("I hope it is correct.\n\nProblem:\n") == 4
    r1 = render_prompt("r1", problem, think_tag="thought")
    assert "<thought>" in r1 and "<think>" not in r1
    shot = {"problem": "2*3", "solution": "2*3=<<2*3=6>>6", "answer": "6"}
    assert render_prompt("cot", problem, shots=[shot]).startswith(
        "<|im_start|>user\n2*3\nLet's think step by step.<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n2*3=6\n</think>\n\\boxed{6}<|im_end|>\n")
    hashes = [prompt_hash(preset) for preset in PRESETS if preset != "few-shot-cot"]
    hashes += [prompt_hash("plain", system="S"), prompt_hash("cot", shots=[shot])]
    assert len(set(hashes)) == len(hashes), hashes
    assert prompt_hash("few-shot-cot") == prompt_hash("cot")


def test_eval_shots_are_never_evaluated_problems():
    with temporary_dir() as folder:
        path = write_lines(folder / "own.jsonl", [p | {"solution": "so"} for p in sum_problems(30)])
        with raises(ValueError, "--shots-from"):
            load_shots(str(path), 2, 0, sum_problems(30))
    few = load_shots("arithmetic", 3, 0, [])
    assert len(few) == 3 and few == load_shots("arithmetic", 5, 0, [])[:3], "a prefix"


def test_eval_rates_by_hand():
    """One record each: right in a box, right only in words, cut off, no answer, undecided."""
    replies = ["\\boxed{1}", "the answer is 2", "<think>\nlet me see, 2 and 1 make ...", "no idea",
               "\\boxed{6}"]

    def grade(pairs, strict):
        return [None if "{6}" in text else evaluation.extract_answer(text, strict) == reference
                for text, reference in pairs]

    with mock.patch.object(evaluation, "verify_many", grade):
        records = _evaluate(lambda text, *_: replies[parse_sum(text)], sum_problems(5),
                            max_new_tokens=20)
    row = evaluation.summarize(records, method="greedy", grade="strict")
    assert row["accuracy"] == 0.2 and row["n"] == 5, row
    assert _rates(row) == {"strict": 0.2, "lenient": 0.4, "cut off": 0.2, "no answer": 0.6,
                           "undecided": 0.2}, row
    assert evaluation.summarize(records, method="greedy", grade="lenient")["accuracy"] == 0.4
    assert row["tokens_mean"] == sum(min(20, len(reply) + 1) for reply in replies) / 5
    levels = row["levels"]
    assert levels["1"][0] == 1.0 and levels["2"][0] == 0.0 and levels["1"][3] == 1


def test_eval_votes_pool_equivalent_answers():
    """\\frac12, 0.5 and 2/4 are one class; without a box, a last number is not a vote."""
    replies = ["\\boxed{\\frac12}", "\\boxed{0.5}", "\\boxed{2/4}", "\\boxed{3}", "\\boxed{3}",
               "it is 3", "or 3"]
    problem = [{"id": "a", "problem": "half?", "answer": "1/2"}]
    [record] = _evaluate(lambda text, seed, sample: replies[sample], problem, num_samples=7,
                         temperature=1.0, max_new_tokens=50)
    assert evaluation.votes_of(record) == ([0, 0, 0, 1, 1, None, None], {0})
    row = evaluation.summarize([record], method="sampled", grade="strict")
    rates = _rates(row)
    assert rates["maj@5"] > rates["maj@1"] == row["accuracy"] == 3 / 7
    assert abs(rates["pass@1"] - 3 / 7) < 1e-12 and rates["pass@5"] == 1.0


def test_eval_resumed_run_gives_the_same_records():
    """A run killed at its seventh answer, with half a line written, resumes without sampling any
    problem twice. Records used to be written in hundreds, and a kill lost twenty minutes."""
    setup = scripted_setup(sum_problems(11))
    texts = []

    def reply(text, seed, sample):
        texts.append(text)
        return f"\\boxed{{{seed % 3}}}"

    def interrupted(text, seed, sample):
        if len(texts) == 6:
            raise KeyboardInterrupt
        return reply(text, seed, sample)

    expected = _collect(setup, reply)
    texts.clear()
    with temporary_dir() as folder:
        path = folder / "records.jsonl"
        setup = setup._replace(records=path)
        with contextlib.suppress(KeyboardInterrupt):
            _collect(setup, interrupted)
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") == 6
        path.write_text(text + text[:70], encoding="utf-8")  # killed while writing a line
        assert _collect(setup, reply) == expected and len(texts) == 11
        assert list(map(_answer, evaluation.read_records(path).values())) == expected
        other = setup._replace(options=setup.options | {"temperature": 1.0})
        with raises(ValueError, "temperature 0.7 -> 1.0"):
            _collect(other, reply)


def test_eval_records_do_not_depend_on_the_batch():
    """Sampling from random weights gives the same completions alone, in any batch and order."""
    problems = sum_problems(9)

    def texts(problems, **changes):
        records = evaluation.evaluate(*small_model(), problems, num_samples=3, temperature=1.0,
                                      max_new_tokens=12, **changes)
        return {r["id"]: [s["text"] for s in r["samples"]] for r in records}

    together = texts(problems)
    assert texts(problems[::-1], max_batch=2) == together
    assert texts(problems[4:5]) == {"sum/4": together["sum/4"]}
    assert len({t for row in together.values() for t in row}) == 27, "every sample differs"
    assert texts(problems, seed=1) != together


def test_eval_records_do_not_depend_on_the_number_of_processes():
    """One process and three write the same records; so do three that resume a run of one."""
    with temporary_dir() as folder:
        words = ["eval.py", "--model", _save_small(folder, "model"), "--limit", 7,
                 "--num-samples", 2, "--temperature", 0.8, "--max-new-tokens", 9,
                 "--results", folder / "rows.jsonl"]
        one, three, broken = (folder / f"{name}.jsonl" for name in ("one", "three", "broken"))
        run(*words, "--processes", 1, "--records", one)
        out = run(*words, "--processes", 3, "--records", three)
        assert out.count("accuracy") == 1, "only one process prints"
        lines = one.read_text(encoding="utf-8").splitlines(keepends=True)
        broken.write_text("".join(lines[:3]), encoding="utf-8")
        run(*words, "--processes", 3, "--records", broken)
        found = [{i: _answer(record) for i, record in evaluation.read_records(path).items()}
                 for path in (one, three, broken)]
        for record in (record for records in found for record in records.values()):
            for sample in record["samples"]:
                sample["logprob"] = round(sample["logprob"], 1)  # equal up to rounding
        assert len(found[0]) == 7 and found[0] == found[1] == found[2]
        assert [row["processes"] for row in read_lines(folder / "rows.jsonl")] == [1, 3, 3]


def test_eval_compare_is_paired():
    with temporary_dir() as folder:
        paths = [folder / "a.jsonl", folder / "b.jsonl"]
        for path, right, count in zip(paths, (4, 9), (12, 10)):
            setup = scripted_setup(sum_problems(count))
            setup.settings["model"] = path.stem

            def reply(text, *_, right=right):
                return f"\\boxed{{{parse_sum(text) + (1 if parse_sum(text) < right else 7)}}}"

            _collect(setup._replace(records=path), reply)
        text = in_process("eval", "--compare", *paths)
    for words in ("(10 of 12) | 40.0", "(10 of 10) | 90.0", "| +50.0 [", "model 'a' -> 'b'",
                  "5 of 10 problems gained, 0 lost; McNemar's exact p = 0.062"):
        assert words in text, (words, text)


def test_eval_find_row_matches_every_field():
    """The newest row that agrees in every field is found. Weights are identified by content, not by
    path."""
    with temporary_dir() as folder:
        path = folder / "results.jsonl"
        assert evaluation.find_row(path) is None
        rows = [{"method": "greedy", "weights": weights, "accuracy": accuracy}
                for accuracy, weights in ((0.1, "x"), (0.2, "x"), (0.3, "y"))]
        evaluation.append_rows(path, rows)
        found = evaluation.find_row(path, method="greedy", weights="x")
        assert found["accuracy"] == 0.2 and {"command", "commit", "torch"} <= set(found)
        assert evaluation.find_row(path, method="greedy", weights="z") is None
        hashes = []
        for value in (0.0, 0.0, 1.0):
            save_file({"w": torch.full((4,), value)}, folder / "model.safetensors")
            hashes.append(evaluation.weights_hash(folder))
        assert hashes[0] == hashes[1] != hashes[2]


def test_eval_warns_of_training_problems_when_a_row_lacks_some():
    """Long few-shot prompts were dropped from a row; the warning for a trained model crashed."""
    with (temporary_dir() as folder,
          answering(lambda text, *_: f"\\boxed{{{parse_sum(text)}}}") as printed):
        setup = scripted_setup(sum_problems(4))._replace(
            trained_on={"sum/1"}, results=folder / "rows.jsonl")
        row = evaluation.measure(setup._replace(problems=setup.problems[:3]), "some")
        evaluation.publish(setup, [row])
    printed = printed.getvalue()
    assert "trained on 1 of these 4 problems" in printed, printed
    assert "some: 0.0 [0.0, 65.8] % without them" in printed, printed


def test_eval_user_errors_are_one_line():
    cases = {"eval --data nowhere.jsonl": "nowhere.jsonl", "eval --num-samples 4": "temperature",
             "eval --compare no.jsonl no.jsonl": "no.jsonl", "eval --device tpu": "--device tpu",
             "infer_scale --num-samples 4 --votes 5": "--votes",
             "infer_scale --temperature 0": "--temperature"}
    with temporary_dir() as folder:
        path = _save_small(folder, "model")
        results = ["--results", folder / "rows.jsonl", "--processes"]
        for command, expected in cases.items():
            error = error_of(*command.split(), "--model", path, *results, 1)
            assert expected in error and "\n" not in error, (command, error)
        assert "none" in run("eval.py", "--model", folder / "none", ok=False)
        path = write_lines(folder / "records.jsonl", [{"id": "a", "samples": [],
                                                  "settings": {"model": "other"}}])
        error = run("eval.py", "--limit", 2, "--records", path, *results, 2, ok=False)
        assert "model 'other' -> 'tiny'" in error and "another --records" in error, error
        for line in ("1", "[]", '{"id": [1]}', '{"id": 1, "settings": []}', "\xff",
                     '{"id": 1, "settings": {}, "samples": [{"strict": true}]}',
                     '{"id": 1, "settings": {}, "samples": 3}'):
            path.write_text(line + "\n", encoding="latin-1")
            with raises(ValueError, "records.jsonl, line 1: not a record of eval.py"):
                evaluation.read_records(path, {"seed": 0})


def test_eval_report_measures_only_missing_rows():
    """Rows with other weights, shots or temperatures do not match. Each script runs once for all
    its rows; sampled rows have a limit of their own."""
    ran = []
    with temporary_dir() as folder:
        base = _save_small(folder, "base")
        trained = _save_small(folder, "trained", seed=1)
        results = folder / "results.jsonl"
        row = {"data": "arithmetic", "split": "test", "data_seed": 0, "seed": 0, "shots": 0,
               "grade": "strict", "seconds": 10.0, "accuracy": 0.5, "low": 0.4, "high": 0.6,
               "tokens_mean": 20.0, "levels": {"1": [0.5, 0.4, 0.6, 5]}, "n": 10,
               "scores": {str(i): 0.0 for i in range(10)}}

        def run_script(script, *words):
            assert "--compile" in words  # passed through
            flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
            sampled = "num-samples" in flags
            ran.append((script, Path(flags["model"]).name, flags["prompt"], sampled))
            n = int(flags["limit"])
            measured = row | {
                "weights": evaluation.weights_hash(flags["model"]), "prompt": flags["prompt"],
                "temperature": float(flags["temperature"]), "n": n,
                "scores": {str(i): float(n == 4 and i < 2) for i in range(n)}}
            methods = {
                "eval.py": ["sampled" if sampled else "greedy"],
                "infer_scale.py": ["one sample", "majority of 10"],
                "refine.py": ["refine, K = 2", "self-consistency at the tokens of K = 2"]}
            evaluation.append_rows(results, [measured | {"method": m} for m in methods[script]])

        decoy = row | {"weights": evaluation.weights_hash(base), "method": "greedy",
                       "prompt": "plain", "temperature": 0.0, "accuracy": 0.99}
        evaluation.append_rows(results, [decoy | wrong for wrong in (
            {"shots": 4}, {"weights": "other"}, {"temperature": 0.7}, {"n": 4},
            {"prompt": "cot", "split": "dev"})])
        words = ["--report", "--model", base, "--trained", trained, "--limit", 10,
                 "--sampled-limit", 4, "--results", results, "--out", folder / "out", "--compile"]
        with mock.patch.object(evaluation, "run_script", run_script):
            in_process("eval", *words)
            assert ran == [
                ("eval.py", "base", "plain", False), ("eval.py", "base", "cot", False),
                ("infer_scale.py", "base", "cot", False), ("refine.py", "base", "cot", False),
                ("eval.py", "trained", "plain", False), ("eval.py", "base", "plain", True),
                ("eval.py", "trained", "plain", True)], ran
            in_process("eval", *words)
            assert len(ran) == 7, "existing rows are not measured again"
        text = Path(folder, "out", "results.md").read_text(encoding="utf-8")
    assert text.count("50.0 [40.0, 60.0]") == 9 and "99.0" not in text, text
    same = "50.0 [40.0, 60.0] | +0.0 [+0.0, +0.0] | 50.0 | 20 | 1.000 | 10 |"
    assert f"| + GRPO | {same}" in text, text
    assert "| + GRPO, sampled | 50.0 [40.0, 60.0] | +50.0 [" in text, "paired on the shared four"
    assert "| 2.500 | 4 |" in text, text


def test_eval_a_problem_too_long_for_the_context_is_dropped():
    """With a message. One such problem used to end every run that reached it."""
    with temporary_dir() as folder:
        problems = [{"problem": f"What is {i} + 1?", "answer": str(i + 1), "solution": f"{i} + 1",
                     "level": 1} for i in range(30)]
        long = ("What is " + "1 + " * n + "1?" for n in range(600, 700))
        long = next(text for text in long if split_of(text) == "dev")  # what sft.py evaluates on
        data = write_lines(folder / "mine.jsonl", [*problems, {"problem": long, "answer": "600",
                                                          "level": 1}])
        usual = ["--processes", 1, "--max-new-tokens", 8]
        words = ["--data", data, "--results", folder / "rows", *usual]
        printed = "1 of 31 problems dropped"
        assert printed in in_process("eval", *words)
        assert evaluation.find_row(folder / "rows", asked=31)["n"] == 30, "the report finds the row"
        assert printed in in_process("refine", *words, "--rounds", 1, "--temperature", 0)
        with mock.patch.object(evaluation, "generate", wraps=evaluation.generate) as generate:
            assert printed in in_process("infer_scale", *words, "--shots-from", "arithmetic",
                                      "--experiments", "prompts", "--exemplars", 2, "--compile")
        # a GPU used to allocate its cache and capture its graphs again for each file of records
        first, *others = [call.kwargs for call in generate.call_args_list]
        assert isinstance(first["engine"], evaluation.Engine) and first["compiled"]
        assert others and all(other["engine"] is first["engine"] for other in others)
        error = error_of("eval", *words, "--max-new-tokens", 1024)
        assert "31 of 31 problems dropped" in error, error
        printed = in_process("grpo", "--data", "arithmetic", "--eval-data", data, "--steps", 1,
                          "--prompts", 2, "--group", 2, *usual, "--train-limit", 9, "--refill", 0,
                          "--run-dir", folder / "run")
        assert printed.count("problems dropped") == 2 and "30 test," in printed, printed
        examples = write_lines(folder / "examples.jsonl", [
            {"problem": p["problem"], "response": "1"} for p in problems[:9]])
        printed = in_process("sft", "--data", examples, "--validation", 0, "--epochs", 1,
                          "--eval-data", f"{data}:1", "--run-dir", folder / "sft", *usual)
        assert "problems dropped" in printed and "val_accuracy" in printed


def test_eval_disk_full_or_read_only():
    """A one-line error, not a traceback; before sampling if possible, else after the table."""
    import resource  # Unix only
    with temporary_dir() as folder:
        words = ["--limit", 2, "--processes", 1, "--results", folder / "rows"]
        for flag in ("--results", "--records"):
            error = error_of("eval", *words, flag, f"{__file__}/of.jsonl")
            assert f"{__file__}/of.jsonl: could not be written (" in error, error
        with (contextlib.redirect_stdout(io.StringIO()) as printed,
              raises(ValueError, "/dev/full: could not be written (No space left")):
            evaluation.main(evaluation.parse_args([*map(str, words), "--results", "/dev/full"]))
        assert "| greedy |" in printed.getvalue()
        path = folder / "lines"
        evaluation.append_lines(path, [{"a": 1}])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12, limits[1]))  # like a disk that fills up
        try:
            with raises(ValueError, "lines: could not be written"):
                evaluation.append_lines(path, [{"b": 1}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == '{"a": 1}\n', "no partial line"


def test_eval_wide_tables_fit_a_terminal():
    table = ["method", "accuracy, % [95 %]"], [["greedy", "1.0 [0, 2]"], ["b", 3]]
    for columns, expected in (("80", evaluation.markdown(*table) + "\n"), ("30", (
            "method              greedy\naccuracy, % [95 %]  1.0 [0, 2]\n\n"
            "method              b\naccuracy, % [95 %]  3\n\n"))):
        with (mock.patch.dict("os.environ", COLUMNS=columns),
              contextlib.redirect_stdout(io.StringIO()) as printed):
            printed.isatty = lambda: True
            evaluation.say_table(*table)
        assert printed.getvalue() == expected, printed.getvalue()
