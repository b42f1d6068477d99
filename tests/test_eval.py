"""Tests of eval.py."""

import contextlib
import importlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

from tests.common import ROOT, scripted, small_model, sum_problems


def test_eval_wilson_is_the_root_of_its_definition():
    """The bounds are the p for which correct/n lies 1.96 standard errors of p away; found here by bisection."""
    from eval import interval, wilson

    for correct, n in ((0, 7), (3, 7), (7, 7), (120, 500), (499, 500), (1, 1319)):
        rate, z = correct / n, 1.959963984540054
        gap = lambda p: abs(rate - p) - z * math.sqrt(p * (1 - p) / n)  # negative inside the interval
        for bound, outside in zip(wilson(correct, n), (0.0, 1.0)):
            inside = rate
            if correct in (0, n) and outside == rate:
                assert abs(bound - rate) < 1e-9, (correct, n, bound)
                continue
            for _ in range(100):
                middle = (inside + outside) / 2
                inside, outside = (middle, outside) if gap(middle) < 0 else (inside, middle)
            assert abs(bound - inside) < 1e-9, (correct, n, bound, inside)
        assert [round(x, 12) for x in interval([1] * correct + [0] * (n - correct))] == [
            round(x, 12) for x in (rate, *wilson(correct, n))
        ]


def test_eval_interval_counts_problems_not_samples():
    """40 problems with ten equal samples each know no more than 40 problems; samples that differ narrow the interval, to 400 at best."""
    from eval import interval, wilson

    rate, low, high = interval([1.0] * 10 + [0.0] * 30)
    assert (rate, low, high) == (0.25, *wilson(10, 40))
    _, low, high = interval([0.2, 0.3] * 20)
    assert 0 < low and high - low < 0.5 * (wilson(10, 40)[1] - wilson(10, 40)[0])
    assert interval([0.5] * 8)[1:] == wilson(4, 8), "no variance at all is no certainty"


def test_eval_interval_covers():
    """Of 400 simulated evaluations of 60 problems, 4 samples each, about 95 % of the intervals hold the true rate."""
    from eval import interval

    rng, held = random.Random(0), 0
    for _ in range(400):
        rates = [rng.betavariate(0.6, 1.4) for _ in range(60)]  # mean 0.3: most problems easy or hard, as real ones are
        _, low, high = interval([sum(rng.random() < p for _ in range(4)) / 4 for p in rates])
        held += low <= 0.3 <= high
    assert 0.92 <= held / 400 <= 0.98, held


def test_eval_pass_at_k_is_the_mean_over_subsets():
    from infer_scale import pass_at_k

    for n, c in ((1, 0), (1, 1), (6, 0), (6, 2), (7, 6), (8, 8)):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(s) for s in itertools.combinations(outcomes, k)]
            assert abs(pass_at_k(n, c, k) - sum(subsets) / len(subsets)) < 1e-12, (n, c, k)
    for k in (0, 5):
        try:
            pass_at_k(4, 2, k)
        except ValueError:
            continue
        raise AssertionError(f"pass@{k} of 4 samples has no meaning")


def test_eval_maj_at_k_is_the_mean_over_subsets():
    """Brute force over every subset, with silent samples, ties shared, and no right class, one, or two."""
    from eval import maj_at_k

    rng = random.Random(1)
    for _ in range(150):
        votes = [rng.choice((None, 0, 0, 1, 2)) for _ in range(rng.randint(1, 8))]
        right = {c for c in (0, 2) if rng.random() < 0.6}
        for k in range(1, len(votes) + 1):
            total = count = 0
            for subset in itertools.combinations(votes, k):
                counts = Counter(v for v in subset if v is not None)
                leaders = [v for v in counts if counts[v] == max(counts.values())]
                total += sum(v in right for v in leaders) / len(leaders) if leaders else 0
                count += 1
            assert abs(maj_at_k(votes, right, k) - total / count) < 1e-12, (votes, right, k)


def test_eval_bootstrap_agrees_with_the_exact_binomial():
    """When B solves 30 of 200 problems more and loses none, a resample's mean is Binomial(200, 0.15)/200 exactly."""
    from eval import paired_bootstrap

    a, b = [0] * 200, [1] * 30 + [0] * 170
    change, low, high = paired_bootstrap(a, b, draws=20_000)
    chances = [math.comb(200, x) * 0.15**x * 0.85 ** (200 - x) for x in range(201)]
    quantile = lambda q: next(x for x in range(201) if sum(chances[: x + 1]) >= q) / 200
    assert change == 0.15
    assert abs(low - quantile(0.025)) <= 1 / 200 and abs(high - quantile(0.975)) <= 1 / 200, (low, high)
    assert paired_bootstrap(b, b) == (0.0, 0.0, 0.0), "pairing removes what both runs share"


def test_eval_mcnemar_is_the_exact_sign_test():
    """Against all 2^n ways in which the problems that differ could have fallen."""
    from eval import mcnemar

    for gained, lost in ((0, 0), (1, 0), (3, 3), (9, 2), (0, 10)):
        n = gained + lost
        ways = [abs(2 * sum(bits) - n) >= abs(gained - lost) for bits in itertools.product((0, 1), repeat=n)]
        assert abs(mcnemar(gained, lost) - sum(ways) / len(ways)) < 1e-12, (gained, lost)


def test_eval_prompts_to_the_letter():
    """The published protocols fail by a space: demonstrations joined by blank lines, nothing behind the last colon."""
    from eval import PRESETS, prompt_hash, render_prompt

    problem = {"problem": r"What is {x} in \boxed{}?"}
    assert (
        render_prompt("plain", problem)
        == "<|im_start|>user\nWhat is {x} in \\boxed{}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render_prompt("plain", problem, system="S").startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n")
    boxed = render_prompt("boxed", problem, system="the model's own")
    assert boxed.startswith(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    ), boxed
    gsm8k = render_prompt("qwen-base-gsm8k", problem)
    assert (
        gsm8k.count("Question: ") == 5 and gsm8k.count("The answer is ") == 4 and gsm8k.endswith("\\boxed{}?\nAnswer:")
    )
    assert "The answer is 8.\n\nQuestion: What is {x}" in gsm8k and "\\\n" not in gsm8k
    minerva = render_prompt("minerva-math", problem)
    assert (
        minerva.count("Problem:\n") == 5
        and minerva.count("I hope it is correct.\n\nProblem:\n") == 4
        and minerva.endswith("?\n\nSolution:")
    )
    assert "<thought>" in render_prompt("r1", problem, think_tag="thought") and "<think>" not in render_prompt(
        "r1", problem, think_tag="thought"
    )
    shot = {"problem": "2*3", "solution": "2*3=<<2*3=6>>6", "answer": "6"}
    assert render_prompt("cot", problem, shots=[shot]).startswith(
        "<|im_start|>user\n2*3\nLet's think step by step.<|im_end|>\n<|im_start|>assistant\n<think>\n2*3=6\n</think>\n\\boxed{6}<|im_end|>\n"
    )
    hashes = [prompt_hash(p) for p in PRESETS if p != "few-shot-cot"] + [
        prompt_hash("plain", system="S"),
        prompt_hash("cot", shots=[shot]),
    ]
    assert len(set(hashes)) == len(hashes) and prompt_hash("few-shot-cot") == prompt_hash("cot"), hashes


def test_eval_corpus_says_what_the_prompts_ask():
    """The tiny model knows its prompts from its corpus, so the two texts must be one."""
    import eval as eval_module
    import refine

    corpus = (ROOT / "data" / "tiny" / "corpus.py").read_text(encoding="utf-8")
    for text in (eval_module.COT.removeprefix("{problem}"), refine.CHECK, refine.AGAIN, refine.APPROVAL):
        assert json.dumps(text) in corpus, text


def test_eval_examples_are_never_problems_asked():
    from argparse import Namespace

    from eval import load_shots

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.jsonl"
        path.write_text("".join(json.dumps(p | {"solution": "so"}) + "\n" for p in sum_problems(30)), encoding="utf-8")
        args = Namespace(shots_from=None, data_seed=0)
        try:
            load_shots(args, str(path), sum_problems(30), 2)
        except ValueError as error:
            assert "--shots-from" in str(error), error
        else:
            raise AssertionError("an example with its answer stood in front of the same problem")
        assert len(load_shots(args, "arithmetic", [], 3)) == 3
        assert load_shots(args, "arithmetic", [], 3) == load_shots(args, "arithmetic", [], 5)[:3], (
            "few are the first of many"
        )


def test_eval_counts_what_there_is_to_count():
    """One record of each kind: right in the box, right only in words, cut off, silent, undecided."""
    import eval as eval_module

    replies = {
        0: "\\boxed{1}",
        1: "the answer is 2",
        2: "<think>\nlet me see, 2 and 1 make ...",
        3: "no idea",
        4: "\\boxed{6}",
    }
    reply = lambda text, seed, sample: replies[int(re.search(r"user\n(\d+)\+1", text)[1])]
    undecided = lambda pairs, strict: [
        None if "{6}" in text else eval_module.extract_answer(text, strict) == ref for text, ref in pairs
    ]
    with (
        mock.patch.object(eval_module, "generate", scripted(reply)),
        mock.patch.object(eval_module, "verify_many", undecided),
    ):
        records = eval_module.evaluate(None, *small_model()[1:], sum_problems(5), max_new_tokens=20, progress=False)
    row = eval_module.summarize(records, method="greedy", prompt="plain")
    assert (row["accuracy"], row["strict"][0], row["lenient"][0]) == (0.2, 0.2, 0.4), row
    assert (row["truncated"], row["no_answer"], row["undecided"], row["n"]) == (0.2, 0.6, 1, 5), row
    assert eval_module.summarize(records, method="greedy", prompt="plain", grade="lenient")["accuracy"] == 0.4
    lengths = [len(r) + 1 for r in (replies[0], replies[1])] + [20, len(replies[3]) + 1, len(replies[4]) + 1]
    assert (
        row["tokens_mean"] == sum(lengths) / 5
        and row["tokens_median"] == sorted(lengths)[2]
        and row["tokens_per_correct"] == sum(lengths)
    )
    assert row["levels"]["1"][0] == 1.0 and row["levels"]["2"][0] == 0.0 and row["levels"]["1"][3] == 1


def test_eval_votes_pool_equivalent_answers():
    """\\frac12, 0.5 and 2/4 are one candidate; a sample without a box casts no vote, not even for its last number."""
    import eval as eval_module

    replies = ["\\boxed{\\frac12}", "\\boxed{0.5}", "\\boxed{2/4}", "\\boxed{3}", "\\boxed{3}", "it is 3", "or 3"]
    problem = [{"id": "a", "problem": "half?", "answer": "1/2"}]
    with mock.patch.object(eval_module, "generate", scripted(lambda text, seed, sample: replies[sample])):
        [record] = eval_module.evaluate(
            None, *small_model()[1:], problem, num_samples=7, temperature=1.0, max_new_tokens=50, progress=False
        )
    votes, right = eval_module.votes_of(record)
    assert votes == [0, 0, 0, 1, 1, None, None] and right == {0}
    row = eval_module.summarize([record], method="sampled", prompt="plain")
    assert row["maj_at"]["5"][0] > row["maj_at"]["1"][0] == row["accuracy"] == 3 / 7
    assert abs(row["pass_at"]["1"][0] - 3 / 7) < 1e-12 and row["pass_at"]["5"][0] == 1.0


def test_eval_interrupted_run_ends_with_the_same_records():
    """Killed in its third chunk with half a line written, the run goes on; nothing is asked twice, and the order is kept."""
    import eval as eval_module

    problems, wrong = sum_problems(11), lambda text, seed, sample: f"\\boxed{{{seed % 3}}}"
    model = (None, *small_model()[1:])
    options = {"max_new_tokens": 50, "max_batch": 1, "settings": {"model": "m", "temperature": 0.0}, "progress": False}
    bare = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    with tempfile.TemporaryDirectory() as folder:
        path, calls = Path(folder) / "records.jsonl", []
        with mock.patch.object(eval_module, "generate", scripted(wrong)):
            whole = eval_module.evaluate(*model, problems, **options)

        def killed(*args, **kwargs):
            if len(calls) == 2:
                raise KeyboardInterrupt
            return scripted(wrong, calls)(*args, **kwargs)

        with mock.patch.object(eval_module, "generate", killed):
            try:
                eval_module.evaluate(*model, problems, **options, path=path)
            except KeyboardInterrupt:
                pass
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") == 6
        path.write_text(text + text[:70], encoding="utf-8")  # the machine went down while a line was written
        with mock.patch.object(eval_module, "generate", scripted(wrong, calls)):
            resumed = eval_module.evaluate(*model, problems, **options, path=path)
            assert bare(resumed) == bare(whole) and sum(calls) == 11, calls
            assert bare(eval_module.read_records(path).values()) == bare(whole)
            try:
                eval_module.evaluate(
                    *model, problems, **options | {"settings": {"model": "m", "temperature": 1.0}}, path=path
                )
            except ValueError as error:
                assert "temperature 0.0 (now 1.0)" in str(error), error
            else:
                raise AssertionError("records of two different runs were mixed")


def test_eval_a_record_depends_on_its_problem_alone():
    """Real sampling on random weights: the same completions alone, in any batch, in any order."""
    from eval import evaluate

    model, problems = small_model(), sum_problems(9)
    options = {"num_samples": 3, "temperature": 1.0, "max_new_tokens": 12, "progress": False}
    texts = lambda records: {r["id"]: [s["text"] for s in r["samples"]] for r in records}
    together = texts(evaluate(*model, problems, **options))
    assert texts(evaluate(*model, problems[::-1], **options, max_batch=2)) == together
    assert texts(evaluate(*model, problems[4:5], **options)) == {"sum/4": together["sum/4"]}
    assert len({t for row in together.values() for t in row}) == 27, "every sample has noise of its own"
    assert texts(evaluate(*model, problems, **options, seed=1)) != together


def test_eval_compare_is_paired():
    import eval as eval_module

    with tempfile.TemporaryDirectory() as folder:
        for name, right in (("a", 4), ("b", 9)):
            reply = lambda text, seed, sample: (
                f"\\boxed{{{(n := int(re.search(r'user.(.+?)[+]1', text, re.S)[1])) + (1 if n < right else 7)}}}"
            )
            with mock.patch.object(eval_module, "generate", scripted(reply)):
                eval_module.evaluate(
                    None,
                    *small_model()[1:],
                    sum_problems(12)[: 12 if name == "a" else 10],
                    max_new_tokens=50,
                    progress=False,
                    path=Path(folder) / name,
                    settings={"prompt": "plain", "model": name},
                )
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            eval_module.compare(Path(folder) / "a", Path(folder) / "b")
    assert "40.0" in out.getvalue() and "90.0" in out.getvalue() and "difference in points: +50.0" in out.getvalue(), (
        out.getvalue()
    )
    assert (
        "model 'a' / 'b'" in out.getvalue() and "5 problems gained, 0 lost; McNemar's exact p = 0.062" in out.getvalue()
    ), out.getvalue()


def test_eval_rows_are_found_by_what_they_are():
    """The report takes the newest row that agrees in every field, and weights are told apart by content, not by path."""
    from safetensors.torch import save_file

    from eval import append_row, find_row, fingerprint, read_rows

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        assert read_rows(path) == []
        for accuracy, weights in ((0.1, "x"), (0.2, "x"), (0.3, "y")):
            append_row(path, {"method": "greedy", "weights": weights, "accuracy": accuracy})
        assert find_row(read_rows(path), method="greedy", weights="x")["accuracy"] == 0.2
        assert find_row(read_rows(path), method="greedy", weights="z") is None
        assert {"command", "commit", "torch"} <= set(read_rows(path)[0])
        prints = []
        for value in (0.0, 0.0, 1.0):
            save_file({"w": torch.full((4,), value)}, Path(folder) / "model.safetensors")
            prints.append(fingerprint(folder))
        assert prints[0] == prints[1] != prints[2]


def test_eval_user_errors_are_one_line():
    cases = {
        "eval.py --data nowhere.jsonl": "nowhere.jsonl",
        "eval.py --num-samples 4": "temperature",
        "eval.py --compare no.jsonl no.jsonl": "no.jsonl",
        "infer_scale.py --num-samples 4 --votes 5": "--votes",
        "refine.py --prompt minerva-math": "no chat",
    }
    with tempfile.TemporaryDirectory() as folder:
        from model import save_model

        params, config, tokenizer = small_model()
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        save_model(Path(folder) / "model", params, config, like=folder)
        for command, expected in cases.items():
            script, *flags = command.split()
            module = importlib.import_module(script.removesuffix(".py"))
            try:
                args = module.parse_args(
                    [*flags, "--model", str(Path(folder) / "model"), "--results", str(Path(folder) / "r.jsonl")]
                )
                with contextlib.redirect_stdout(io.StringIO()):
                    module.main(args)
            except (ValueError, FileNotFoundError) as error:
                assert expected in str(error) and "\n" not in str(error), (command, error)
            else:
                raise AssertionError(f"{command} went through")
        done = subprocess.run(
            [sys.executable, ROOT / "eval.py", "--model", folder + "/none"], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done


def test_eval_report_measures_what_is_missing_and_nothing_else():
    """Rows of other weights, shots or temperatures do not pass for the ones asked; each script is run once, for all its rows."""
    import eval as eval_module
    from model import save_model

    ran = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        params, config, tokenizer = small_model()
        tokenizer.save(str(folder / "tokenizer.json"))
        save_model(folder / "base", params, config, like=folder)
        save_model(folder / "trained", small_model(seed=1)[0], config, like=folder)
        same = {"data": "arithmetic", "split": "test", "data_seed": 0, "seed": 0, "n": 10, "shots": 0, "grade": "strict", "seconds": 1.0}
        shares = {
            "accuracy": 0.5,
            "low": 0.4,
            "high": 0.6,
            "tokens_mean": 20.0,
            "tokens_per_correct": 40.0,
            "levels": {"1": [0.5, 0.4, 0.6, 5], "2": [0.3, 0.1, 0.6, 5]},
        }
        results = str(folder / "results.jsonl")

        def neighbour(script, *flags):
            flags = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
            ran.append(
                (script, Path(flags["model"]).name, flags["prompt"] + (", sampled" if "num-samples" in flags else ""))
            )
            row = (
                same
                | shares
                | {"weights": eval_module.fingerprint(flags["model"]), "prompt": flags["prompt"], "temperature": 0.7}
            )
            methods = {
                "eval.py": ["sampled" if "num-samples" in flags else "greedy"],
                "infer_scale.py": ["one sample", "majority of 10"],
                "refine.py": ["refine, K = 2", "self-consistency at the tokens of K = 2"],
            }[script]
            for method in methods:
                eval_module.append_row(
                    results, row | {"method": method} | ({"temperature": 0.0} if method == "greedy" else {})
                )

        decoy = (
            same
            | shares
            | {
                "weights": eval_module.fingerprint(folder / "base"),
                "method": "greedy",
                "prompt": "plain",
                "temperature": 0.0,
            }
        )
        for wrong in (
            {"shots": 4},
            {"weights": "other"},
            {"temperature": 0.7},
            {"n": 11},
            {"prompt": "cot", "split": "dev"},
        ):
            eval_module.append_row(results, decoy | wrong | {"accuracy": 0.99})
        args = eval_module.parse_args(
            [
                "--report",
                "--model",
                str(folder / "base"),
                "--trained",
                str(folder / "trained"),
                "--limit",
                "10",
                "--results",
                results,
                "--out",
                str(folder / "out"),
            ]
        )
        with mock.patch.object(eval_module, "run_neighbour", neighbour), contextlib.redirect_stdout(io.StringIO()):
            eval_module.main(args)
            assert ran == [
                ("eval.py", "base", "plain"),
                ("eval.py", "base", "cot"),
                ("infer_scale.py", "base", "cot"),
                ("refine.py", "base", "cot"),
                ("eval.py", "trained", "plain"),
                ("eval.py", "base", "plain, sampled"),
                ("eval.py", "trained", "plain, sampled"),
            ], ran
            eval_module.main(args)
            assert len(ran) == 7, "what is there is not measured again"
        text = (folder / "out" / "results.md").read_text(encoding="utf-8")
        assert text.count("50.0 [40.0, 60.0]") == 9 and "99.0" not in text and "| + GRPO |" in text, text
