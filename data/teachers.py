"""Teachers write raw traces. A trace is one line, appended when it is whole: a run can be resumed.

    {"problem_id", "sample", "text", "finish", "prompt_tokens", "completion_tokens", "seconds"}

The first line of the file holds the settings that the traces were made with; a run with other
settings is refused. SOLUTIONS are the teachers whose replies are there already. An endpoint takes
jobs, pairs (problem, sample), and calls `keep(problem, sample, reply)` with each reply.
"""

import json
import os
import random
import re
import socket
import threading
import time
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from urllib.error import HTTPError

from data import family_of
from data.families import plant_error
from data.prompts import respond
from launch import printable

INSTRUCTION = (
    "\n\nThink step by step. Write every calculation as an equation, one on a line. "
    "Put the final answer in \\boxed{}."
)
MAX_REPLY_BYTES = 4_000_000
MAX_WAIT_S = 120

# ---- the file


def read_raw(path, settings):
    """({(problem id, sample): trace} of a file of raw traces, the bytes of its whole lines).

    Raises ValueError when the file was made with other settings.
    """
    content = Path(path).read_bytes() if Path(path).exists() else b""
    content = content[:content.rfind(b"\n") + 1]
    traces = {}
    found = settings
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            if number == 1:
                found = dict(row["settings"])
            elif isinstance(row["text"], str) and isinstance(row["finish"], str):
                traces.setdefault((row["problem_id"], row["sample"]), row)
            else:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            where = f"{path}, line {number}"
            raise ValueError(f"{where}: not a raw trace; give another --out") from None
    other = [f"{k} {found.get(k)!r}, now {settings.get(k)!r}"
             for k in {**found, **settings} if found.get(k) != settings.get(k)]
    if other:
        raise ValueError(f"{path} was made with other settings ({'; '.join(other)}); "
                         "give another --out")
    return traces, len(content)


def open_raw(path, settings):
    """(the traces in a file, the file opened for appending, less a line that a crash cut off)."""
    traces, size = read_raw(path, settings)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab", buffering=0)
    file.truncate(size)
    if not size:
        append(file, {"settings": settings})
    return traces, file


def append(file, row):
    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


# ---- an endpoint


class Bounded(urllib.request.HTTPSHandler, urllib.request.HTTPHandler,
              urllib.request.HTTPRedirectHandler):
    """Opens connections that can be cut: a socket's own time-out begins anew with every byte.

    Follows no redirection, which would carry the key to another host.
    """

    connection = None

    def redirect_request(self, *_):
        return None

    def do_open(self, kind, request, **options):
        def connect(*where, **how):
            self.connection = kind(*where, **how)
            return self.connection

        return super().do_open(connect, request, **options)

    def cut(self):
        with suppress(OSError, AttributeError, TypeError):  # not open yet, or closed already
            socket.socket.shutdown(self.connection.sock, socket.SHUT_RDWR)


def count_of(usage, name):
    """A number of tokens that a reply claims, or 0: a strange claim is no reason to pay twice."""
    count = usage.get(name) if isinstance(usage, dict) else 0
    return int(count) if type(count) in (int, float) and 0 <= count < 1e12 else 0


def read_reply(reply):
    """What is kept of a chat completion. Raises OSError, as a broken line would, if it is none."""
    body = reply.read(MAX_REPLY_BYTES)
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text = choice["message"].get("content") or ""
        thought = choice["message"].get("reasoning_content") or ""
        finish = str(choice.get("finish_reason"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"not a chat completion: {error!r}") from None
    if not isinstance(text, str) or not isinstance(thought, str) or not (text + thought).strip():
        raise OSError("no text in the reply")
    if thought:
        text = f"<think>\n{thought.strip()}\n</think>\n{text}"
    counts = {name: count_of(data.get("usage"), name)
              for name in ("prompt_tokens", "completion_tokens")}
    return {"text": text, "finish": printable(finish)[:40], **counts}


def ask_once(request, timeout_s):
    bounded = Bounded()
    timer = threading.Timer(timeout_s, bounded.cut)
    timer.start()
    try:
        with urllib.request.build_opener(bounded).open(request, timeout=timeout_s) as reply:
            return read_reply(reply)
    finally:
        timer.cancel()


def describe(error):
    """What a failed request says, on one line that is safe to print: no codes, and not the key."""
    text = str(getattr(error, "reason", error)) or type(error).__name__
    if isinstance(error, HTTPError):
        text = f"{error.code} {text}"
        with suppress(OSError, HTTPException):
            text += ": " + error.read(300).decode("utf-8", "replace")
    if key := os.environ.get("OPENAI_API_KEY"):
        text = text.replace(key, "(the key)")
    return printable(" ".join(text.split()))


def ask(request, stop, complain, *, retries, timeout_s, backoff_s):
    """The reply to a request, sent until one comes or the event `stop` is set, or None.

    complain(reason) is called for every time that none came. Raises ValueError on a refusal.
    """
    for attempt in range(retries + 1):
        if stop.is_set():
            return None
        asked = time.monotonic()
        delay = 0.0
        try:
            reply = ask_once(request, timeout_s)
            return reply | {"seconds": round(time.monotonic() - asked, 2)}
        except HTTPError as error:
            reason = describe(error)
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                raise ValueError(f"the teacher at {request.full_url} refused: {reason}") from None
            with suppress(ValueError):
                delay = float(error.headers.get("Retry-After", 0))
        except (OSError, HTTPException) as error:
            reason = describe(error)
            if time.monotonic() - asked >= timeout_s:
                reason = f"no whole reply within {timeout_s:g} s"
        complain(reason)
        if attempt < retries:
            backoff = backoff_s * 2 ** attempt * random.uniform(0.5, 1.5)
            stop.wait(min(MAX_WAIT_S, max(backoff, delay)))
    return None


def ask_endpoint(jobs, settings, keep, complain, *, url, concurrency, **patience):
    """Asks an OpenAI-compatible endpoint; keep() gets None for what stays unanswered.

    Interrupted, it waits for what is already asked and paid for, keeps that too, and raises
    KeyboardInterrupt again. patience: the retries, timeout_s and backoff_s of `ask`.
    """
    stop = threading.Event()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"

    def work(problem, sample):
        question = {"role": "user", "content": problem["problem"] + settings["instruction"]}
        payload = {
            "model": settings["model"], "messages": [question],
            "temperature": settings["temperature"], "max_tokens": settings["max_new_tokens"],
            "seed": settings["seed"] + sample,
        }
        body = json.dumps(payload).encode()
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
        return ask(request, stop, complain, **patience)

    jobs = iter(jobs)
    futures = {}
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:  # one job a worker, none in store: few replies are ever not yet kept
                for job in islice(jobs, concurrency - len(futures)):
                    futures[pool.submit(work, *job)] = job
                if not futures:
                    return
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    keep(*futures.pop(future), future.result())
        except BaseException:
            stop.set()
            for future in wait(futures).done:
                if not future.exception() and future.result():
                    keep(*futures[future], future.result())
            raise


# ---- solutions that are there already


def solver_reply(problem, sample, settings):
    """A generator's own solution; in a share of them, `error_rate`, one step is wrong."""
    family = family_of(problem)
    if not family or not problem.get("solution"):
        raise ValueError(f"{problem['id']}: the solver knows the generated families only; "
                         "choose another --teacher")
    rng = random.Random(f"{settings['seed']} {problem['id']} {sample}")
    planted = rng.random() < settings["error_rate"]
    thought = plant_error(family, problem, rng) if planted else problem["solution"]
    text = respond(thought, problem["answer"], settings["think_tag"])
    return {"text": text, "finish": "stop", "planted_error": planted}


def gsm8k_reply(problem, sample, settings):
    """GSM8K's own solution, without its <<48/2=24>> annotations, in the thinking format."""
    if problem.get("subject") != "gsm8k":
        raise ValueError(f"{problem['id']} is not a problem of gsm8k; choose another --teacher")
    lines = re.sub(r"<<[^<>\n]*>>", "", problem["solution"]).split("\n")
    thought = "\n".join(line.strip() for line in lines if line.strip())
    return {"text": respond(thought, problem["answer"], settings["think_tag"]), "finish": "stop"}


SOLUTIONS = {"solver": solver_reply, "gsm8k-solutions": gsm8k_reply}
