"""Teachers: whoever writes the raw traces. A trace is one line, appended when it is whole, so a run can be resumed.

    {"problem_id", "sample", "text": a whole model output, "finish", "prompt_tokens", "completion_tokens", "seconds"}

The first line of the file holds the settings that the traces were made with; a run with other settings is refused.
"""

import email.utils
import json
import os
import random
import re
import threading
import time
import urllib.request
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from urllib.error import HTTPError

from verify import format_reward

INSTRUCTION = ("\n\nThink step by step. Write every calculation as an equation, one on a line. "
               "Put the final answer in \\boxed{}.")
MAX_REPLY_BYTES, MAX_WAIT_S = 4_000_000, 120


def respond(thought, answer, tag):
    """The form that every trace is brought into, and that sft.py trains on."""
    return f"<{tag}>\n{thought}\n</{tag}>\n\\boxed{{{answer}}}"


def in_form(text, tag):
    """Whether an answer is one thinking block, one box, nothing behind it; a box alone is not what is taught here."""
    return text.startswith(f"<{tag}>") and format_reward(text, tag) == 1


# ---------------------------------------------------------------------------------------------- the file


def read_raw(path, settings):
    """({(problem id, sample): trace} of a file of raw traces, the length of its whole lines in bytes).

    Raises ValueError when the file was made with other settings.
    """
    content = Path(path).read_bytes() if Path(path).exists() else b""
    content = content[:content.rfind(b"\n") + 1]
    traces = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            if number == 1:
                found = row["settings"]
            else:
                traces.setdefault((row["problem_id"], row["sample"]), row)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a raw trace; give another --out") from None
        if number == 1 and found != settings:
            other = [f"{k} {found.get(k)!r}, now {settings.get(k)!r}" for k in {**found, **settings}
                     if found.get(k) != settings.get(k)]
            raise ValueError(f"{path} was made with other settings ({'; '.join(other)}); give another --out")
    return traces, len(content)


def open_raw(path, settings):
    """(the traces in a file of raw traces, the file opened for appending, without a line that a crash cut off)."""
    traces, size = read_raw(path, settings)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab", buffering=0)
    file.truncate(size)
    if not size:
        append(file, {"settings": settings})
    return traces, file


def append(file, row):
    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


# ---------------------------------------------------------------------------------------------- over HTTP


class Garbage(Exception):
    """A reply that is not one; asking again may help."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would carry the key to another host."""

    def redirect_request(self, *_):
        return None


class Pace:
    """Lets callers through evenly, `per_minute` a minute (0: no limit), and nobody while the server asks for quiet."""

    def __init__(self, per_minute, stop):
        self.gap_s, self.stop = (60 / per_minute if per_minute else 0), stop
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self):
        with self.lock:
            start = max(time.monotonic(), self.next)
            self.next = start + self.gap_s
        self.stop.wait(max(0, start - time.monotonic()))

    def hold(self, seconds):
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


def retry_after(headers):
    """The seconds that a Retry-After header asks for, given as a number or a date; 0 without one."""
    value = (headers or {}).get("Retry-After", "")
    if re.fullmatch(r"\d{1,6}", value.strip()):
        return min(MAX_WAIT_S, int(value))
    try:
        return min(MAX_WAIT_S, max(0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()))
    except (ValueError, TypeError, IndexError):
        return 0


def read_reply(reply, deadline):
    """The part of a chat completion that is kept. Raises Garbage when it is none."""
    body = b""
    while block := reply.read1(1 << 16):
        body += block
        if len(body) > MAX_REPLY_BYTES or time.monotonic() > deadline:
            raise Garbage("too long, or too slow")
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text, thought = choice["message"].get("content") or "", choice["message"].get("reasoning_content") or ""
        usage = data.get("usage") or {}
        counts = {key: int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Garbage(f"not a chat completion ({type(error).__name__}): {body[:80]!r}") from None
    if not isinstance(text, str) or not isinstance(thought, str) or not (text + thought).strip():
        raise Garbage("no text in the reply")
    return {"text": f"<think>\n{thought.strip()}\n</think>\n{text}" if thought else text,
            "finish": str(choice.get("finish_reason")), **counts}


def ask(url, payload, headers, pace, retries, timeout_s, backoff_s):
    """One chat completion, asked for until it comes; None when it never does. Raises ValueError when it is refused."""
    request = urllib.request.Request(url.rstrip("/") + "/chat/completions", json.dumps(payload).encode(), headers)
    for attempt in range(retries + 1):
        pace.wait()
        if pace.stop.is_set():
            return None
        asked, delay = time.monotonic(), 0
        try:
            with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout_s) as reply:
                return read_reply(reply, asked + timeout_s) | {"seconds": round(time.monotonic() - asked, 2)}
        except HTTPError as error:
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                detail = " ".join(error.read(300).decode("utf-8", "replace").split())
                raise ValueError(f"the teacher at {url} refused: {error.code} {error.reason}: {detail}") from None
            delay = retry_after(error.headers)
            if error.code == 429:
                pace.hold(delay)
        except (OSError, HTTPException, Garbage):
            pass
        if attempt < retries:
            pace.stop.wait(max(delay, min(MAX_WAIT_S, backoff_s * 2 ** attempt) * random.uniform(0.5, 1.5)))
    return None


def ask_endpoint(jobs, settings, file, *, url, concurrency, requests_per_minute, retries, timeout_s, backoff_s,
                 progress):
    """Asks an OpenAI-compatible endpoint for each (problem, sample) of `jobs`: the number that stayed unanswered.

    Interrupted, it waits for what is already asked and paid for, keeps that too, and raises KeyboardInterrupt again.
    """
    stop = threading.Event()
    pace = Pace(requests_per_minute, stop)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"

    def work(problem, sample):
        question = {"role": "user", "content": problem["problem"] + settings["instruction"]}
        payload = {"model": settings["model"], "messages": [question], "temperature": settings["temperature"],
                   "max_tokens": settings["max_new_tokens"], "seed": settings["seed"] + sample}
        return ask(url, payload, headers, pace, retries, timeout_s, backoff_s)

    def keep(future):
        problem, sample = futures.pop(future)
        reply = future.result()
        if reply:
            append(file, {"problem_id": problem["id"], "sample": sample} | reply)
        progress(reply)
        return not reply

    jobs, futures, unanswered = iter(jobs), {}, 0
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:  # one job a worker and none in store: what is answered and not yet kept stays as few
                futures |= {pool.submit(work, *job): job for job in islice(jobs, concurrency - len(futures))}
                if not futures:
                    return unanswered
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    unanswered += keep(future)
        except BaseException:
            stop.set()
            for future in wait(futures).done:
                if not future.exception():
                    keep(future)
            raise


# ---------------------------------------------------------------------------------------------- on this machine


def ask_model(jobs, settings, file, *, samples, device, max_batch, progress):
    """Asks a model directory through generate.py, as many problems at once as a batch holds."""
    import torch

    from generate import generate
    from model import load_config, load_params, load_system_prompt, load_tokenizer, render_chat, resolve_model

    path = resolve_model(settings["model"])
    config, tokenizer, system = load_config(path), load_tokenizer(path), load_system_prompt(path)
    params = load_params(path, device, torch.bfloat16 if device == "cuda" else torch.float32)
    ends = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")} - {None} | set(config.eos_token_id)
    asked = {}
    for problem, sample in jobs:
        asked.setdefault(problem["id"], (problem, set()))[1].add(sample)
    asked = list(asked.values())
    chunk = max(1, max_batch // samples)
    for begin in range(0, len(asked), chunk):
        part = asked[begin:begin + chunk]
        questions = [{"role": "user", "content": p["problem"] + settings["instruction"]} for p, _ in part]
        prompts = [tokenizer.encode(render_chat([q], system=system), add_special_tokens=False).ids for q in questions]
        seeds = [zlib.crc32(problem["id"].encode()) for problem, _ in part]
        found = generate(params, config, prompts, num_samples=samples, max_new_tokens=settings["max_new_tokens"],
                         temperature=settings["temperature"], stop_tokens=ends, seed=settings["seed"], seeds=seeds,
                         max_batch=max_batch)
        for (problem, wanted), prompt, completions in zip(part, prompts, found):
            for sample in sorted(wanted):
                tokens = completions[sample].tokens
                text = tokenizer.decode([t for t in tokens if t not in ends], skip_special_tokens=False)
                row = {"text": text, "finish": completions[sample].finish, "prompt_tokens": len(prompt),
                       "completion_tokens": len(tokens)}
                append(file, {"problem_id": problem["id"], "sample": sample} | row)
                progress(row)


def ask_solver(jobs, settings, file, *, families, progress):
    """The generators' own solutions; a share of them, `error_rate`, with one wrong step before the right answer."""
    for problem, sample in jobs:
        family = families.get(problem.get("subject"))
        if not family or not problem.get("solution"):
            raise ValueError(f"{problem['id']}: the solver knows the generated families only; choose another --teacher")
        rng = random.Random(f"{settings['seed']} {problem['id']} {sample}")
        planted = rng.random() < settings["error_rate"]
        thought = family.plant_error(problem, rng) if planted else problem["solution"]
        text = respond(thought, problem["answer"], settings["think_tag"])
        row = {"problem_id": problem["id"], "sample": sample, "text": text, "finish": "stop", "planted_error": planted}
        append(file, row)
        progress(row)


def rewrite_gsm8k(solution):
    """A GSM8K solution as a thought: `48/2 = <<48/2=24>>24 clips` becomes `48/2 = 24 clips`."""
    lines = [re.sub(r"<<[^<>]*>>", "", line).strip() for line in solution.split("\n")]
    return "\n".join(line for line in lines if line)


def ask_gsm8k(jobs, settings, file, *, progress):
    """GSM8K's own solutions, in the thinking format."""
    for problem, sample in jobs:
        if problem.get("subject") != "gsm8k":
            raise ValueError(f"{problem['id']} is not a problem of gsm8k; choose another --teacher")
        text = respond(rewrite_gsm8k(problem["solution"]), problem["answer"], settings["think_tag"])
        row = {"problem_id": problem["id"], "sample": sample, "text": text, "finish": "stop"}
        append(file, row)
        progress(row)
