"""Teachers that write raw traces, one per line, appended as they complete so that runs can resume.

    {"problem_id", "sample", "text", "finish", "prompt_tokens", "completion_tokens", "seconds"}

The first line of the file holds the settings that produced the traces; a run with different
settings is refused. SOLUTIONS are the teachers that need no model. ask_endpoint is given jobs,
pairs (problem, sample), and calls `on_reply(problem, sample, reply)` for each.
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
from data.prompts import format_response
from launch import printable

INSTRUCTION = (
    "\n\nThink step by step. Write every calculation as an equation, one on a line. "
    "Put the final answer in \\boxed{}."
)
MAX_REPLY_BYTES = 4_000_000
MAX_WAIT_S = 120

# ---- the file of raw traces


def read_raw(path, settings):
    """({(problem id, sample): trace}, size in bytes of the complete lines) of a file.

    Raises ValueError if the file was made with other settings.
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
                continue
            if not isinstance(row["text"], str) or not isinstance(row["finish"], str):
                raise TypeError
            traces.setdefault((row["problem_id"], row["sample"]), row)
        except (ValueError, KeyError, TypeError):
            where = f"{path}, line {number}"
            raise ValueError(f"{where}: not a raw trace; give another --out") from None
    changes = [f"{k} {found.get(k)!r}, now {settings.get(k)!r}"
               for k in {**found, **settings} if found.get(k) != settings.get(k)]
    if changes:
        raise ValueError(f"{path} was made with other settings ({'; '.join(changes)}); "
                         "give another --out")
    return traces, len(content)


def open_raw(path, settings):
    """(the traces in a file, the file open for appending); removes an incomplete last line."""
    traces, size = read_raw(path, settings)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab", buffering=0)
    file.truncate(size)
    if not size:
        append_row(file, {"settings": settings})
    return traces, file


def append_row(file, row):
    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


# ---- an endpoint


class Abortable(urllib.request.HTTPSHandler, urllib.request.HTTPHandler,
                urllib.request.HTTPRedirectHandler):
    """Opens connections that another thread can abort; a socket's timeout restarts at every byte.

    Does not follow redirects, which would send the key to another host.
    """

    connection = None

    def redirect_request(self, *_):
        return None

    def do_open(self, kind, request, **options):
        def connect(*where, **how):
            self.connection = kind(*where, **how)
            return self.connection

        return super().do_open(connect, request, **options)

    def abort(self):
        with suppress(OSError, AttributeError, TypeError):  # not yet open, or already closed
            socket.socket.shutdown(self.connection.sock, socket.SHUT_RDWR)


def token_count(usage, name):
    """A token count from a reply's usage; 0 if malformed, since the reply may still be good."""
    count = usage.get(name) if isinstance(usage, dict) else 0
    return int(count) if type(count) in (int, float) and 0 <= count < 1e12 else 0


def read_reply(reply):
    """A trace's fields from a chat completion. Raises OSError if it is malformed."""
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
    counts = {name: token_count(data.get("usage"), name)
              for name in ("prompt_tokens", "completion_tokens")}
    return {"text": text, "finish": printable(finish)[:40], **counts}


def send(request, timeout_s):
    handler = Abortable()
    timer = threading.Timer(timeout_s, handler.abort)
    timer.start()
    try:
        with urllib.request.build_opener(handler).open(request, timeout=timeout_s) as reply:
            return read_reply(reply)
    finally:
        timer.cancel()


def describe(error):
    """A failed request's message, safe to print: one line, no control characters, key redacted."""
    text = str(getattr(error, "reason", error)) or type(error).__name__
    if isinstance(error, HTTPError):
        text = f"{error.code} {text}"
        with suppress(OSError, HTTPException):
            text += ": " + error.read(300).decode("utf-8", "replace")
    if key := os.environ.get("OPENAI_API_KEY"):
        text = text.replace(key, "(the key)")
    return printable(" ".join(text.split()))


def ask(request, stop, on_failure, *, retries, timeout_s, backoff_s):
    """The reply to a request, with retries; None if all fail or the event `stop` is set.

    on_failure(reason) is called after each failure. Raises ValueError if the endpoint refuses.
    """
    for attempt in range(retries + 1):
        if stop.is_set():
            return None
        begin = time.monotonic()
        delay = 0.0
        try:
            reply = send(request, timeout_s)
            return reply | {"seconds": round(time.monotonic() - begin, 2)}
        except HTTPError as error:
            reason = describe(error)
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                raise ValueError(f"the teacher at {request.full_url} refused: {reason}") from None
            with suppress(ValueError):
                delay = float(error.headers.get("Retry-After", 0))
        except (OSError, HTTPException) as error:
            reason = describe(error)
            if time.monotonic() - begin >= timeout_s:
                reason = f"no complete reply within {timeout_s:g} s"
        on_failure(reason)
        if attempt < retries:
            backoff = backoff_s * 2 ** attempt * random.uniform(0.5, 1.5)
            stop.wait(min(MAX_WAIT_S, max(backoff, delay)))
    return None


def ask_endpoint(jobs, settings, on_reply, on_failure, *, url, concurrency, **retry):
    """Query an OpenAI-compatible endpoint; on_reply gets None for a job that stays unanswered.

    When interrupted, it waits for the requests in flight, which are paid for, passes on their
    replies, and re-raises. retry: the retries, timeout_s and backoff_s of `ask`.
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
        return ask(request, stop, on_failure, **retry)

    jobs = iter(jobs)
    futures = {}
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:  # queue only one job per worker, so that few replies wait to be saved
                for job in islice(jobs, concurrency - len(futures)):
                    futures[pool.submit(work, *job)] = job
                if not futures:
                    return
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    on_reply(*futures.pop(future), future.result())
        except BaseException:
            stop.set()
            for future in wait(futures).done:
                if not future.exception() and future.result():
                    on_reply(*futures[future], future.result())
            raise


# ---- existing solutions


def solver_reply(problem, sample, settings):
    """The generator's own solution; with probability `error_rate`, one step is made wrong."""
    family = family_of(problem)
    if not family or not problem.get("solution"):
        raise ValueError(f"{problem['id']}: the solver supports only the generated families; "
                         "choose another --teacher")
    rng = random.Random(f"{settings['seed']} {problem['id']} {sample}")
    planted = rng.random() < settings["error_rate"]
    thought = plant_error(family, problem, rng) if planted else problem["solution"]
    text = format_response(thought, problem["answer"], settings["think_tag"])
    return {"text": text, "finish": "stop", "planted_error": planted}


def gsm8k_reply(problem, sample, settings):
    """GSM8K's own solution in the thinking format, without its <<48/2=24>> annotations."""
    if problem.get("subject") != "gsm8k":
        raise ValueError(f"{problem['id']} is not a GSM8K problem; choose another --teacher")
    lines = re.sub(r"<<[^<>\n]*>>", "", problem["solution"]).split("\n")
    thought = "\n".join(line.strip() for line in lines if line.strip())
    response = format_response(thought, problem["answer"], settings["think_tag"])
    return {"text": response, "finish": "stop"}


SOLUTIONS = {"solver": solver_reply, "gsm8k-solutions": gsm8k_reply}
